// Pages and lengths of the transactional KV cache.
#include "kv_cache.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace specfast {
namespace {

/// Copies the positions [begin, end) of one head's page; see KvPage for the order they lie in. `beside` elements of K
/// (dimensions) and of V (positions) are neighbours.
template <class T>
void read_page(const KvPage& page, int begin, int end, int head_dim, int padded_dim, int beside, T* k, T* v) {
  const T* keys = static_cast<const T*>(page.k);
  for (int i = begin; k && i < end; i++) {
    const T* tile = keys + i / kKeyTile * kKeyTile * head_dim + i % kKeyTile * beside;
    for (int d = 0; d < head_dim; d++)
      k[(i - begin) * head_dim + d] = tile[d / beside * beside * kKeyTile + d % beside];
  }
  const T* slice = static_cast<const T*>(page.v);
  for (int first = 0; v && first < head_dim; first += kValueSlice) {
    const int width = std::min(kValueSlice, padded_dim - first);
    for (int i = begin; i < end; i++) {
      const T* from = slice + i / beside * beside * width + i % beside;
      for (int d = 0; d < std::min(width, head_dim - first); d++)
        v[(i - begin) * head_dim + first + d] = from[d * beside];
    }
    slice += width * kPagePositions;
  }
}

}  // namespace

KvCache::KvCache(const KvShape& shape, const std::vector<Window>& windows, int64_t capacity, int64_t undo)
    : shape_(shape), capacity_(capacity), undo_(undo) {
  for (int32_t layer = 0; layer < shape.layers; layer++) {
    const Window window = windows.empty() ? Window{} : windows[static_cast<size_t>(layer)];
    const auto same = [window](const Store& store) { return store.window == window; };
    auto store = std::find_if(stores_.begin(), stores_.end(), same);
    if (store == stores_.end()) {
      stores_.emplace_back().window = window;
      store = stores_.end() - 1;
    }
    places_.push_back({static_cast<int32_t>(store - stores_.begin()), store->layers++});
  }
}

KvCache KvCache::over(const KvShape& shape, uint8_t* pages, int64_t count) {
  KvCache cache(shape, {}, count * kPagePositions);
  cache.places_.assign(static_cast<size_t>(shape.layers), {0, 0});
  Store& store = cache.stores_.front();
  store.layers = 1;
  const size_t bytes = cache.page_bytes(store);
  for (int64_t page = 0; page < count; page++)
    store.pages.emplace_back(pages + static_cast<size_t>(page) * bytes, Free{false});
  return cache;
}

void KvCache::Free::operator()(uint8_t* p) const {
  if (owned) std::free(p);
}

size_t KvCache::page_bytes(const Store& store) const {
  const size_t heads = static_cast<size_t>(store.layers) * static_cast<size_t>(shape_.kv_heads);
  return heads * shape_.head_page_bytes();
}

size_t KvCache::bytes() const {
  size_t total = 0;
  for (const Store& store : stores_) {
    const auto taken =
        std::count_if(store.pages.begin(), store.pages.end(), [](const Page& p) { return p != nullptr; });
    total += (static_cast<size_t>(taken) + store.spare.size()) * page_bytes(store);
  }
  return total;
}

KvCache::Page KvCache::take_page(Store& store) const {
  if (!store.spare.empty()) {
    Page page = std::move(store.spare.back());
    store.spare.pop_back();
    return page;
  }
  const size_t bytes = (page_bytes(store) + 63) / 64 * 64;
  Page page{static_cast<uint8_t*>(std::aligned_alloc(64, bytes))};
  if (!page) throw std::bad_alloc();
  std::memset(page.get(), 0, bytes);  // padding lanes are read, and must be finite
  return page;
}

void KvCache::take_pages(Store& store, int64_t first, int64_t last) const {
  if (store.pages.size() < static_cast<size_t>(last)) store.pages.resize(static_cast<size_t>(last));
  for (int64_t i = first; i < last; i++) {
    if (Page& page = store.pages[static_cast<size_t>(i)]; !page) page = take_page(store);
  }
}

int64_t KvCache::least_length() const {
  int64_t least = 0;
  for (const Store& store : stores_) {
    if (store.held) least = std::max(least, store.held + store.window.size - 1);
  }
  return least;
}

bool KvCache::append(int64_t rows) {
  const int64_t start = length_ + provisional_, end = start + rows;
  if (end > capacity_) return false;
  for (Store& store : stores_) {
    // by the row after a rollback
    const int64_t needed = store.window.first(std::max<int64_t>(length_ - undo_, 0)) / kPagePositions;
    for (int64_t page = std::max(store.held / kPagePositions, store.sink_pages()); page < needed; page++)
      store.spare.push_back(std::move(store.pages[static_cast<size_t>(page)]));
    if (needed > store.sink_pages()) store.held = std::max(store.held, needed * kPagePositions);
    take_pages(store, start / kPagePositions, (end + kPagePositions - 1) / kPagePositions);
  }
  provisional_ += rows;
  return true;
}

void KvCache::commit(int64_t rows) {
  commit_first(rows);
  provisional_ = 0;
}

void KvCache::commit_first(int64_t rows) {
  rows = std::min(rows, provisional_);
  length_ += rows;
  provisional_ -= rows;
}

void KvCache::drop_to(int64_t rows) {
  if (rows < provisional_) provisional_ = rows;
}

void KvCache::truncate(int64_t length) {
  provisional_ = 0;
  length_ = std::min(length_, length);
  if (length_ > 0) return;
  for (Store& store : stores_) {
    if (store.held == 0) continue;
    for (Page& page : store.pages) {
      if (page) store.spare.push_back(std::move(page));
    }
    store.pages.clear();
    store.held = 0;
  }
}

bool KvCache::restart(int64_t length, const std::vector<int64_t>& held) {
  truncate(0);
  if (length > capacity_) return false;
  std::vector<int64_t> of_stores(stores_.size());
  for (size_t layer = 0; layer < places_.size(); layer++) {
    int64_t& most = of_stores[static_cast<size_t>(places_[layer].store)];
    most = std::max(most, held[layer]);
  }
  const int64_t end = (length + kPagePositions - 1) / kPagePositions;
  for (size_t i = 0; i < stores_.size(); i++) {
    take_pages(stores_[i], 0, std::min(stores_[i].sink_pages(), end));
    take_pages(stores_[i], of_stores[i] / kPagePositions, end);
  }
  for (size_t i = 0; i < stores_.size(); i++) stores_[i].held = of_stores[i];
  length_ = length;
  return true;
}

void KvCache::read(int layer, int64_t first, int64_t rows, int64_t at, int64_t total, void* k, void* v) const {
  const size_t row_bytes = shape_.element_bytes() * static_cast<size_t>(shape_.head_dim);
  const auto row_of = [&](void* base, int64_t row) {
    return base ? static_cast<uint8_t*>(base) + static_cast<size_t>(row) * row_bytes : nullptr;
  };
  for (int32_t head = 0; head < shape_.kv_heads; head++) {
    for (int64_t begin = first; begin < first + rows;) {
      const int64_t row = head * total + at + begin - first;
      const int in_page = static_cast<int>(begin % kPagePositions);
      const int end = static_cast<int>(std::min<int64_t>(kPagePositions, in_page + first + rows - begin));
      const KvPage from = page(begin / kPagePositions, layer, head);
      if (shape_.format == KvFormat::bf16) {
        read_page(from, in_page, end, shape_.head_dim, shape_.padded_dim(), 2,
                  reinterpret_cast<uint16_t*>(row_of(k, row)), reinterpret_cast<uint16_t*>(row_of(v, row)));
      } else {
        read_page(from, in_page, end, shape_.head_dim, shape_.padded_dim(), 1, reinterpret_cast<float*>(row_of(k, row)),
                  reinterpret_cast<float*>(row_of(v, row)));
      }
      begin += end - in_page;
    }
  }
}

template <class F, class G>
void KvCache::visit_codes(int layer, int64_t rows, bool keys, const F& f, const G& g) const {
  const int groups = shape_.groups(), biases = groups * kPagePositions;
  for (int64_t row = 0; row < shape_.kv_heads * rows; row++) {
    const int64_t i = row % rows;
    const int position = static_cast<int>(i % kPagePositions);
    const KvPage here = page(i / kPagePositions, layer, static_cast<int>(row / rows));
    for (int d = 0; d < shape_.head_dim; d++)
      f(keys ? here.key_code(shape_.head_dim, position, d) : here.value_code(shape_.head_dim, position, d),
        row * shape_.head_dim + d);
    for (int group = 0; group < groups; group++) {
      float* scale =
          keys ? here.k_scales + group * kPagePositions + position : here.v_scales + position * groups + group;
      g(scale, scale + biases, row * groups + group);
    }
  }
}

void KvCache::read_codes(int layer, int64_t rows, bool keys, const Codes& to) const {
  const int mask = (1 << shape_.bits) - 1;
  visit_codes(
      layer, rows, keys,
      [&](KvPage::Place at, int64_t i) { to.codes[i] = static_cast<uint8_t>(*at.byte >> at.shift & mask); },
      [&](const float* scale, const float* bias, int64_t i) { to.scales[i] = *scale, to.biases[i] = *bias; });
}

void KvCache::write_codes(int layer, int64_t rows, bool keys, const Codes& from) {
  const int mask = (1 << shape_.bits) - 1;
  visit_codes(
      layer, rows, keys,
      [&](KvPage::Place at, int64_t i) {
        *at.byte = static_cast<uint8_t>((*at.byte & ~(mask << at.shift)) | from.codes[i] << at.shift);
      },
      [&](float* scale, float* bias, int64_t i) { *scale = from.scales[i], *bias = from.biases[i]; });
}

KvPage KvCache::page(int64_t page, int layer, int kv_head) const {
  const Place& place = places_[static_cast<size_t>(layer)];
  const size_t head =
      static_cast<size_t>(place.layer) * static_cast<size_t>(shape_.kv_heads) + static_cast<size_t>(kv_head);
  uint8_t* k = stores_[static_cast<size_t>(place.store)].pages[static_cast<size_t>(page)].get() +
               head * shape_.head_page_bytes();
  uint8_t* v = k + shape_.k_page_bytes();
  float* scales = reinterpret_cast<float*>(v + shape_.v_page_bytes());  // where there are any
  return {k, v, scales, scales + shape_.page_scales(), shape_.format, shape_.bits, shape_.group, shape_.bf16_scales};
}

}  // namespace specfast
