// The KV cache as a transaction: append is provisional, commit keeps a prefix, rollback drops the rest in O(1).
#pragma once

#include <memory>
#include <vector>

#include "types.hpp"

namespace specfast {

/// Keys and values of one sequence in pages of 256 positions. Pages lie at fixed absolute positions, are taken when
/// first needed and kept; lengths alone say what is valid.
///
/// Layers with a sliding window keep what the window of the next position holds, and all provisional positions: pages
/// before are used again for new positions. Provisional positions never push out what a rollback would need.
///
/// A layer with a recurrent state instead of positions fits the same calls: append takes a checkpoint of the state for
/// every provisional position, commit and drop_to choose the one that is kept. There is none yet.
class KvCache {
 public:
  /// `windows` (layers,) has how many positions up to its own each layer attends to, 0 for all; empty means all layers
  /// attend to all. `capacity` bounds length + provisional.
  KvCache(const KvShape& shape, const std::vector<int64_t>& windows, int64_t capacity);

  /// One layer without a window over `count` consecutive pages of somebody else's memory, which must outlive it. Every
  /// layer number names the one layer; appending and truncating are not for it.
  static KvCache over(const KvShape& shape, uint8_t* pages, int64_t count);

  int64_t length() const { return length_; }
  int64_t provisional() const { return provisional_; }
  int64_t capacity() const { return capacity_; }
  size_t bytes() const;
  const KvShape& shape() const { return shape_; }
  /// Positions up to its own that a row attends to in a layer; 0: all.
  int64_t window(int layer) const {
    return stores_[static_cast<size_t>(places_[static_cast<size_t>(layer)].store)].window;
  }
  /// First position that the row at `position` attends to in a layer.
  int64_t first_seen(int layer, int64_t position) const { return first_within(window(layer), position); }
  /// The least length, besides 0, that truncate allows: before it a window has given pages up.
  int64_t least_length() const;

  /// Makes room for `rows` more provisional positions. False, and nothing changed, when the capacity does not allow it.
  /// Throws std::bad_alloc, again with nothing changed.
  bool append(int64_t rows);
  /// Keeps the first `rows` provisional positions and drops the rest.
  void commit(int64_t rows);
  /// Keeps the first `rows` provisional positions; the rest stay provisional.
  void commit_first(int64_t rows);
  /// Drops provisional positions from the end until `rows` are left.
  void drop_to(int64_t rows);
  /// Drops committed positions from the end, and everything provisional. `length` is 0 or at least least_length().
  void truncate(int64_t length);

  /// Copies the stored elements of the first `rows` positions of a layer to k and v, each (kv_heads, rows, head_dim);
  /// either may be null. Not for int8, nor for a layer with a window.
  void read(int layer, int64_t rows, void* k, void* v) const;

  KvPage page(int64_t page, int layer, int kv_head) const;

 private:
  struct Free {
    bool owned = true;
    void operator()(uint8_t* p) const;
  };
  using Page = std::unique_ptr<uint8_t[], Free>;

  /// The layers that share a window.
  struct Store {
    int64_t window = 0;  // 0: all positions
    int32_t layers = 0;
    int64_t first = 0;        // pages before it were given up
    std::vector<Page> pages;  // by absolute page; null where there is none
    std::vector<Page> spare;
  };
  struct Place {
    int32_t store, layer;
  };
  static int64_t first_within(int64_t window, int64_t position) {
    return window && position >= window ? position - window + 1 : 0;
  }
  size_t page_bytes(const Store& store) const;
  Page take_page(Store& store) const;

  KvShape shape_;
  int64_t capacity_;
  int64_t length_ = 0;
  int64_t provisional_ = 0;
  std::vector<Store> stores_;
  std::vector<Place> places_;  // of each layer
};

}  // namespace specfast
