// Pages and lengths of the transactional KV cache.
#include "kv_cache.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace specfast {
namespace {

/// Copies the first `rows` positions of one head's page; see KvPage for the order they lie in. `beside` elements of K
/// (dimensions) and of V (positions) are neighbours.
template <class T>
void read_page(const KvPage& page, int rows, int head_dim, int padded_dim, int beside, T* k, T* v) {
  const T* keys = static_cast<const T*>(page.k);
  for (int i = 0; k && i < rows; i++) {
    const T* tile = keys + i / kKeyTile * kKeyTile * head_dim + i % kKeyTile * beside;
    for (int d = 0; d < head_dim; d++) k[i * head_dim + d] = tile[d / beside * beside * kKeyTile + d % beside];
  }
  const T* slice = static_cast<const T*>(page.v);
  for (int first = 0; v && first < head_dim; first += kValueSlice) {
    const int width = std::min(kValueSlice, padded_dim - first);
    for (int i = 0; i < rows; i++) {
      const T* from = slice + i / beside * beside * width + i % beside;
      for (int d = 0; d < std::min(width, head_dim - first); d++) v[i * head_dim + first + d] = from[d * beside];
    }
    slice += width * kPagePositions;
  }
}

}  // namespace

KvCache::KvCache(const KvShape& shape, const std::vector<int64_t>& windows, int64_t capacity)
    : shape_(shape), capacity_(capacity) {
  for (int32_t layer = 0; layer < shape.layers; layer++) {
    const int64_t window = windows.empty() ? 0 : windows[static_cast<size_t>(layer)];
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

int64_t KvCache::least_length() const {
  int64_t least = 0;
  for (const Store& store : stores_) {
    if (store.first) least = std::max(least, store.first * kPagePositions + store.window - 1);
  }
  return least;
}

bool KvCache::append(int64_t rows) {
  const int64_t start = length_ + provisional_, end = start + rows;
  if (end > capacity_) return false;
  for (Store& store : stores_) {
    const int64_t needed = first_within(store.window, length_) / kPagePositions;  // by the row after a rollback
    for (; store.first < needed; store.first++)
      store.spare.push_back(std::move(store.pages[static_cast<size_t>(store.first)]));
    const size_t pages = static_cast<size_t>((end + kPagePositions - 1) / kPagePositions);
    if (store.pages.size() < pages) store.pages.resize(pages);
    for (size_t page = static_cast<size_t>(start / kPagePositions); page < pages; page++) {
      if (!store.pages[page]) store.pages[page] = take_page(store);
    }
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
    if (store.first == 0) continue;
    for (Page& page : store.pages) {
      if (page) store.spare.push_back(std::move(page));
    }
    store.pages.clear();
    store.first = 0;
  }
}

void KvCache::read(int layer, int64_t rows, void* k, void* v) const {
  const size_t row_bytes = shape_.element_bytes() * static_cast<size_t>(shape_.head_dim);
  const auto at = [&](void* base, size_t row) {
    return base ? static_cast<uint8_t*>(base) + row * row_bytes : nullptr;
  };
  for (int32_t head = 0; head < shape_.kv_heads; head++) {
    for (int64_t first = 0; first < rows; first += kPagePositions) {
      const size_t row = static_cast<size_t>(head * rows + first);
      const int count = static_cast<int>(std::min<int64_t>(kPagePositions, rows - first));
      const KvPage from = page(first / kPagePositions, layer, head);
      if (shape_.format == KvFormat::bf16) {
        read_page(from, count, shape_.head_dim, shape_.padded_dim(), 2, reinterpret_cast<uint16_t*>(at(k, row)),
                  reinterpret_cast<uint16_t*>(at(v, row)));
      } else {
        read_page(from, count, shape_.head_dim, shape_.padded_dim(), 1, reinterpret_cast<float*>(at(k, row)),
                  reinterpret_cast<float*>(at(v, row)));
      }
    }
  }
}

KvPage KvCache::page(int64_t page, int layer, int kv_head) const {
  const Place& place = places_[static_cast<size_t>(layer)];
  const size_t head =
      static_cast<size_t>(place.layer) * static_cast<size_t>(shape_.kv_heads) + static_cast<size_t>(kv_head);
  uint8_t* k = stores_[static_cast<size_t>(place.store)].pages[static_cast<size_t>(page)].get() +
               head * shape_.head_page_bytes();
  uint8_t* v = k + shape_.k_page_bytes();
  if (shape_.format != KvFormat::int8) return {k, v, nullptr, nullptr, shape_.format};
  float* scales = reinterpret_cast<float*>(v + shape_.v_page_bytes());
  return {k, v, scales, scales + kPagePositions, shape_.format};
}

}  // namespace specfast
