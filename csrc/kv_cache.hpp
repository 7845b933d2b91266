// The KV cache as a transaction: append is provisional, commit keeps a prefix, rollback drops the rest in O(1).
#pragma once

#include <memory>
#include <vector>

#include "types.hpp"

namespace specfast {

/// Keys and values of one sequence in pages of 256 positions. Pages lie at fixed absolute positions, are taken when
/// first needed and kept; lengths alone say what is valid.
///
/// Layers with a sliding window keep its sinks, what the window of the next position holds, and all provisional
/// positions: pages between are used again for new positions. Provisional positions never push out what a rollback
/// would need.
///
/// A layer with a recurrent state instead of positions fits the same calls: append takes a checkpoint of the state for
/// every provisional position, commit and drop_to choose the one that is kept. There is none yet.
class KvCache {
 public:
  /// `windows` (layers,); empty means all layers attend to all positions. `capacity` bounds length + provisional. The
  /// last `undo` committed positions can be dropped again, one by one, in any layer.
  KvCache(const KvShape& shape, const std::vector<Window>& windows, int64_t capacity, int64_t undo = 0);

  /// One layer without a window over `count` consecutive pages of somebody else's memory, which must outlive it. Every
  /// layer number names the one layer; appending and truncating are not for it.
  static KvCache over(const KvShape& shape, uint8_t* pages, int64_t count);

  int64_t length() const { return length_; }
  int64_t provisional() const { return provisional_; }
  int64_t capacity() const { return capacity_; }
  size_t bytes() const;
  const KvShape& shape() const { return shape_; }
  const Window& window(int layer) const { return store_of(layer).window; }
  /// First position behind the sinks whose rows a layer still has; 0: all.
  int64_t first_held(int layer) const { return store_of(layer).held; }
  /// The least length, besides 0, that truncate allows: before it a window has given positions up.
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
  /// Forgets everything and counts `length` positions as committed, whose rows the caller then writes: a layer's sinks
  /// and those from held[layer] on, 0 for all. Held is at most what a layer's next row sees. False, and empty, when the
  /// capacity does not allow it. Throws std::bad_alloc, again empty.
  bool restart(int64_t length, const std::vector<int64_t>& held);

  /// What an affine format keeps of the first `rows` positions of a layer without a window, of the keys or of the
  /// values.
  struct Codes {
    uint8_t* codes;  // (kv_heads, rows, head_dim)
    float* scales;   // (kv_heads, rows, groups)
    float* biases;   // alike
  };
  void read_codes(int layer, int64_t rows, bool keys, const Codes& to) const;
  void write_codes(int layer, int64_t rows, bool keys, const Codes& from);
  /// Copies the stored elements of the positions first .. first + rows - 1 of a layer to rows of k and v, which are
  /// (kv_heads, total, head_dim), from `at` on; either may be null. For bf16 and f32.
  void read(int layer, int64_t first, int64_t rows, int64_t at, int64_t total, void* k, void* v) const;

  /// Whether a page is there: those between a window's sinks and what it holds are not.
  bool has_page(int64_t page, int layer) const { return store_of(layer).pages[static_cast<size_t>(page)] != nullptr; }
  KvPage page(int64_t page, int layer, int kv_head) const;

 private:
  struct Free {
    bool owned = true;
    void operator()(uint8_t* p) const;
  };
  using Page = std::unique_ptr<uint8_t[], Free>;

  /// The layers that share a window.
  struct Store {
    Window window;
    int32_t layers = 0;
    int64_t held = 0;         // positions before it, but the sinks, were given up
    std::vector<Page> pages;  // by absolute page; null where there is none
    std::vector<Page> spare;

    int64_t sink_pages() const { return (window.sinks + kPagePositions - 1) / kPagePositions; }
  };
  struct Place {
    int32_t store, layer;
  };
  const Store& store_of(int layer) const {
    return stores_[static_cast<size_t>(places_[static_cast<size_t>(layer)].store)];
  }
  /// Calls f(place of a code, its index) and g(scale, bias, index) for all that read_codes reads.
  template <class F, class G>
  void visit_codes(int layer, int64_t rows, bool keys, const F& f, const G& g) const;
  size_t page_bytes(const Store& store) const;
  Page take_page(Store& store) const;
  /// Takes the pages [first, last) that are not there.
  void take_pages(Store& store, int64_t first, int64_t last) const;

  KvShape shape_;
  int64_t capacity_, undo_;
  int64_t length_ = 0;
  int64_t provisional_ = 0;
  std::vector<Store> stores_;
  std::vector<Place> places_;  // of each layer
};

}  // namespace specfast
