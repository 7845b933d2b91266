// KV pages inside an MLX array: an append-only log that is extended in place.
#pragma once

#include <optional>

#include "mlx_graph.hpp"

namespace kv {

/// Words of an array of so many pages. An array is (words,) uint32: a header, then the pages, 64-byte aligned; one of
/// no words has no pages.
int64_t words(const specfast::Model& model, int64_t pages);
/// How many pages an array has. Throws std::invalid_argument where it cannot be one of this model's.
int64_t pages_of(const specfast::Model& model, const mx::array& kv);
/// The pages of an array that has memory.
specfast::KvPages view(const specfast::Model& model, const mx::array& kv);

/// Where rows are written: the output's pages, and what must be copied to them first, if anything.
struct Append {
  specfast::KvPages from, to;
  size_t page_bytes = 0;

  void copy() const noexcept;
};

/// Gives `out` memory for `rows` rows to be written at `offset` (which may not be known yet). It is `in`'s own where
/// nobody else has the array, and also where nobody has written after `offset`: the positions an earlier array counts
/// stay as they are. Call it when the graph is evaluated; the copy, if any, is the task's.
Append append(const specfast::Model& model, const mx::array& in, mx::array& out, std::optional<int64_t> offset,
              int64_t rows);

/// The value of an offset that is there already.
std::optional<int64_t> known(const mx::array& offset);

}  // namespace kv
