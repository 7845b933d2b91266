// The KV cache as a transaction: append is provisional, commit keeps a prefix, rollback drops the rest in O(1).
#pragma once

#include <memory>
#include <vector>

#include "types.hpp"

namespace specfast {

/// Shape of what one position stores.
struct KvShape {
  int32_t layers = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  bool half = true;  // bf16 elements, else f32

  int32_t padded_dim() const { return (head_dim + 15) / 16 * 16; }
  size_t element_bytes() const { return half ? 2 : 4; }
  size_t k_page_bytes() const { return element_bytes() * kPagePositions * static_cast<size_t>(head_dim); }
  size_t v_page_bytes() const { return element_bytes() * kPagePositions * static_cast<size_t>(padded_dim()); }
};

/// Keys and values of one sequence in pages of 256 positions, with the RoPE angles of each page. Pages are taken when
/// first needed and kept; lengths alone say what is valid.
class KvCache {
 public:
  /// `rope_inv_freq` has head_dim / 2 elements; `capacity` bounds length + provisional.
  KvCache(const KvShape& shape, const std::vector<float>& rope_inv_freq, int64_t capacity);

  int64_t length() const { return length_; }
  int64_t provisional() const { return provisional_; }
  int64_t capacity() const { return capacity_; }
  size_t bytes() const;
  const KvShape& shape() const { return shape_; }

  /// Makes room for `rows` more provisional positions. False, and nothing changed, when the capacity does not allow it.
  /// Throws std::bad_alloc, again with nothing changed.
  bool append(int64_t rows);
  /// Keeps the first `rows` provisional positions and drops the rest.
  void commit(int64_t rows);
  /// Drops provisional positions from the end until `rows` are left.
  void drop_to(int64_t rows);
  /// Drops committed positions from the end, and everything provisional.
  void truncate(int64_t length);

  /// Copies the stored elements (bf16 or f32) of the first `rows` positions of a layer to k and v, each
  /// (kv_heads, rows, head_dim); either may be null.
  void read(int layer, int64_t rows, void* k, void* v) const;

  KvPage page(int64_t page, int layer, int kv_head) const;
  const float* rope_cos(int64_t position) const;
  const float* rope_sin(int64_t position) const;

 private:
  struct Page {
    std::unique_ptr<uint8_t[], void (*)(void*)> kv{nullptr, nullptr};
    std::vector<float> angles;  // cos (256, head_dim / 2), then sin
  };
  void add_page();

  KvShape shape_;
  std::vector<float> inv_freq_;
  int64_t capacity_;
  int64_t length_ = 0;
  int64_t provisional_ = 0;
  std::vector<Page> pages_;
};

}  // namespace specfast
