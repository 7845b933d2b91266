// The law of one row as briefly as it can be stored, its mass by blocks, and draws from it.
#pragma once

#include <cstdint>

#include "law_loops.hpp"

namespace specfast {

/// A row's law: every id below `count`, or a list of `count` ids; p = weight * scale, rounded to float32. Views only.
struct RowLaw {
  int32_t count = 0;
  const int32_t* ids = nullptr;    // ascending; null for every id below count
  const float* weights = nullptr;  // (count,); null where they are computed from the logits each time
  double scale = 1.0;
  const float* logits = nullptr;  // these where weights is null
  float highest = 0, inverse_temperature = 1;
  float* store = nullptr;  // (count,) where computed weights are kept, or null

  /// The probability of any id.
  float probability(const LawLoops& loops, int32_t id) const noexcept;
};

/// What a draft takes from the target's law p, of which a share `prefix` is left: of prefix p it takes min(q, kept
/// prefix p), where q is a law over Vq ids, or certain of `token`, or nothing. q is not read where p has no mass in a
/// list.
struct Drafted {
  const float* q = nullptr;
  int32_t Vq = 0;
  int32_t token = -1;
  double kept = 1.0;
  double prefix = 1.0;

  double operator()(int32_t id) const noexcept {
    return q ? (id < Vq ? static_cast<double>(q[id]) : 0.0) : (id == token ? 1.0 : 0.0);
  }
};

/// How V ids are cut into at most kMost blocks whose masses are added in order.
struct Blocks {
  static constexpr int32_t kMost = 512;

  int32_t V, size, count;

  explicit Blocks(int32_t vocab) noexcept
      : V(vocab), size((vocab / kMost / kChunk + 1) * kChunk), count(vocab / size + (vocab % size != 0)) {}
  int32_t first(int32_t block) const noexcept { return block * size; }
  int32_t last(int32_t block) const noexcept { return V - first(block) < size ? V : first(block) + size; }
  /// The sum of all blocks' masses.
  double total(const double* mass) const noexcept {
    double sum = 0;
    for (int32_t b = 0; b < count; b++) sum += mass[b];
    return sum;
  }
};

/// The weights, or with chunk_of the probabilities, of ids [first, first + n), n <= kChunk, of a law without a list; in
/// `buffer` unless they exist.
const float* weights_of(const LawLoops& loops, const RowLaw& row, int32_t first, int32_t n, float* buffer) noexcept;
const float* chunk_of(const LawLoops& loops, const RowLaw& row, int32_t first, int32_t n, float* buffer) noexcept;

/// Writes what is left of the mass of blocks [first, last) to mass[first..last): sum(c p - min(q, kept c p)), c the
/// prefix.
void block_masses(const LawLoops& loops, const RowLaw& row, const Drafted& drafted, const Blocks& blocks, int32_t first,
                  int32_t last, double* mass) noexcept;

/// The inverse CDF of what is left, in token order, given all its block_masses: the first token whose running mass
/// exceeds u times the total; never one without mass, whatever u in [0, 1) and the rounding. -1 if the total is 0 or
/// NaN.
int32_t pick_token(const LawLoops& loops, const RowLaw& row, const Drafted& drafted, const Blocks& blocks,
                   const double* mass, double u) noexcept;

/// block_masses and pick_token in one, on the calling thread.
int32_t draw_token(const LawLoops& loops, const RowLaw& row, const Drafted& drafted, int32_t V, double u) noexcept;

}  // namespace specfast
