// Pages and lengths of the transactional KV cache.
#include "kv_cache.hpp"

#include <algorithm>
#include <cmath>
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

KvCache::KvCache(const KvShape& shape, const std::vector<float>& rope_inv_freq, int64_t capacity)
    : shape_(shape), inv_freq_(rope_inv_freq), capacity_(capacity) {}

size_t KvCache::bytes() const {
  const size_t heads = static_cast<size_t>(shape_.layers) * static_cast<size_t>(shape_.kv_heads);
  return pages_.size() * heads * (shape_.k_page_bytes() + shape_.v_page_bytes());
}

void KvCache::add_page() {
  const size_t heads = static_cast<size_t>(shape_.layers) * static_cast<size_t>(shape_.kv_heads);
  const size_t bytes = (heads * (shape_.k_page_bytes() + shape_.v_page_bytes()) + 63) / 64 * 64;
  Page page;
  page.angles.resize(static_cast<size_t>(kPagePositions) * static_cast<size_t>(shape_.head_dim));
  const int64_t first = static_cast<int64_t>(pages_.size()) * kPagePositions;
  const size_t half = inv_freq_.size();
  float* cosines = page.angles.data();
  float* sines = cosines + kPagePositions * half;
  for (int i = 0; i < kPagePositions; i++) {
    for (size_t d = 0; d < half; d++) {
      const float angle = static_cast<float>(first + i) * inv_freq_[d];
      cosines[static_cast<size_t>(i) * half + d] = static_cast<float>(std::cos(static_cast<double>(angle)));
      sines[static_cast<size_t>(i) * half + d] = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
  }
  uint8_t* data = static_cast<uint8_t*>(std::aligned_alloc(64, bytes));
  if (!data) throw std::bad_alloc();
  std::memset(data, 0, bytes);  // padding lanes are read, and must be finite
  page.kv = {data, [](void* p) { std::free(p); }};
  pages_.push_back(std::move(page));
}

bool KvCache::append(int64_t rows) {
  const int64_t end = length_ + provisional_ + rows;
  if (end > capacity_) return false;
  while (static_cast<int64_t>(pages_.size()) * kPagePositions < end) add_page();
  provisional_ += rows;
  return true;
}

void KvCache::commit(int64_t rows) {
  length_ += rows < provisional_ ? rows : provisional_;
  provisional_ = 0;
}

void KvCache::drop_to(int64_t rows) {
  if (rows < provisional_) provisional_ = rows;
}

void KvCache::truncate(int64_t length) {
  provisional_ = 0;
  if (length < length_) length_ = length;
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
      if (shape_.half) {
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
  const size_t head = static_cast<size_t>(layer) * static_cast<size_t>(shape_.kv_heads) + static_cast<size_t>(kv_head);
  uint8_t* base = pages_[static_cast<size_t>(page)].kv.get() + head * (shape_.k_page_bytes() + shape_.v_page_bytes());
  return {base, base + shape_.k_page_bytes(), shape_.half};
}

const float* KvCache::rope_cos(int64_t position) const {
  const auto& angles = pages_[static_cast<size_t>(position / kPagePositions)].angles;
  return angles.data() + static_cast<size_t>(position % kPagePositions) * inv_freq_.size();
}

const float* KvCache::rope_sin(int64_t position) const {
  return rope_cos(position) + kPagePositions * inv_freq_.size();
}

}  // namespace specfast
