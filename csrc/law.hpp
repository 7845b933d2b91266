// From logits to the law that is sampled: temperature, then top-k, top-p and min-p; and a draw from it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "row_law.hpp"
#include "thread_pool.hpp"

namespace specfast {

/// How logits become probabilities. Temperature 0 is greedy: all mass on the arg max.
struct Law {
  float temperature = 1.0f;
  int32_t top_k = 0;         // keep the k largest logits; 0 keeps all
  float top_p = 1.0f;        // then keep the fewest tokens that hold at least this share of the mass
  float min_p = 0.0f;        // then drop what is below this fraction of the largest probability
  bool temper_last = false;  // truncate at temperature 1 (mlx-lm), top-p by the mass of all tokens; then temper
  int32_t vocab_limit = 0;   // ids from here on get no mass (padded vocabulary rows); 0 cuts none

  bool greedy() const noexcept { return temperature == 0.0f; }
  bool keeps_list(int32_t vocab) const noexcept {
    return greedy() || (top_k > 0 && top_k < limit(vocab)) || (temper_last && !plain(vocab));
  }
  /// Finite whatever the temperature; 1 for a greedy law.
  float inverse_temperature() const noexcept {
    return greedy() ? 1.0f : std::min(1.0f / temperature, std::numeric_limits<float>::max());
  }
  /// Whether all of `vocab` tokens keep their share.
  bool plain(int32_t vocab) const noexcept {
    return !greedy() && (top_k <= 0 || top_k >= limit(vocab)) && top_p >= 1.0f && min_p <= 0.0f;
  }
  int32_t limit(int32_t vocab) const noexcept { return vocab_limit > 0 && vocab_limit < vocab ? vocab_limit : vocab; }
};

enum class LawStatus : uint8_t {
  ok,
  not_finite,  // a logit is NaN or +inf
  empty,       // every logit is -inf: no token may follow
};

/// What a law is worked out in. Not shared between threads.
struct LawScratch {
  std::vector<uint32_t> keys;
  std::vector<int32_t> ids;
  std::vector<float> values;

  /// Makes room for rows of `vocab` logits (12 bytes each), so that nothing below allocates.
  void reserve(int32_t vocab) {
    const size_t size = static_cast<size_t>(vocab) + 16;
    if (keys.size() >= size) return;
    values.resize(size);
    ids.resize(size);
    keys.resize(size);
  }
};

/// The law of one row of logits (vocab,) float32, in *row; views into `logits`, `scratch` and, if it is not null, `p`
/// (vocab,) float32, where the weights of a law that keeps no list go. `highest` is the largest logit below the limit,
/// or NaN where it is not known.
///
/// A truncation by top-k, or before the temperature, keeps a list, another by top-p or min-p alone all weights. A logit
/// of -inf gets no mass; ids from the limit on are not looked at. Equal logits at the edge of a truncation are kept
/// lowest id first, and -0 equals 0. Sums are float64 in a fixed order and nothing depends on the instruction set or
/// the threads: the same bits on every machine. A weight below exp(-87.3) of the largest is 0. `scratch` should hold
/// reserve(vocab): it is made to if it does not, and the process ends if there is no memory.
LawStatus brief_law(const LawLoops& loops, const float* logits, int32_t vocab, float highest, const Law& law,
                    LawScratch& scratch, float* p, RowLaw* row) noexcept;

/// Where a team meets over a row: the maximum and the mass of each block.
struct SharedRow {
  float highest[Blocks::kMost];
  double mass[Blocks::kMost];
};

/// brief_law of a plain law, worked out by a team: every thread calls it and gets the same row. The weights go to `p`
/// (vocab,) float32, or nowhere if it is null.
///
/// If `ahead`, the logits of the next row, is not null, its maxima go to next->highest on the way, so that memory is
/// read while weights are computed. The call after the next may use `shared` again.
LawStatus plain_law(const LawLoops& loops, const Team& team, const float* logits, int32_t vocab, float highest,
                    const Law& law, float* p, SharedRow& shared, const float* ahead, SharedRow* next,
                    RowLaw* row) noexcept;

/// law_row and sample_token in one, by a team: every thread calls it, thread 0 gets the token. `shared` are two as
/// plain_law wants them.
int32_t draw_row(const LawLoops& loops, const Team& team, const float* logits, int32_t vocab, float highest,
                 const Law& law, double u, float* p, LawScratch& scratch, SharedRow* shared) noexcept;

/// Writes the probabilities of one row of logits: brief_law in full. logits, p: (vocab,) float32, not overlapping. If
/// the status is not ok, p is all zeros.
LawStatus law_row(const LawLoops& loops, const float* logits, int32_t vocab, float highest, const Law& law, float* p,
                  LawScratch& scratch) noexcept;

/// The status of a row by its largest logit.
LawStatus status_of(float highest) noexcept;

/// Throws NumericalError, naming row `row`, if the status of its law is not ok.
void require_ok(LawStatus status, int32_t row);

/// The id of the largest of n logits, the lowest id among equals; -1 if one of them is NaN or n is 0.
int32_t argmax_row(const LawLoops& loops, const float* logits, int32_t n) noexcept;

/// The inverse CDF of p (vocab,), in token order, at u in [0, 1) of its total mass: never a token without mass,
/// whatever u. -1 if there is no mass or it is NaN.
int32_t sample_token(const LawLoops& loops, const float* p, int32_t vocab, double u) noexcept;

}  // namespace specfast
