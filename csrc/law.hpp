// From logits to the law that is sampled: temperature, then top-k, top-p and min-p; and a draw from it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace specfast {

/// How logits become probabilities. Temperature 0 is greedy: all mass on the arg max.
struct Law {
  float temperature = 1.0f;
  int32_t top_k = 0;        // keep the k largest logits; 0 keeps all
  float top_p = 1.0f;       // then keep the fewest tokens that hold at least this share of the mass
  float min_p = 0.0f;       // then drop what is below this fraction of the largest probability
  int32_t vocab_limit = 0;  // ids from here on get no mass (padded vocabulary rows); 0 cuts none

  bool greedy() const noexcept { return temperature == 0.0f; }
  int32_t limit(int32_t vocab) const noexcept { return vocab_limit > 0 && vocab_limit < vocab ? vocab_limit : vocab; }
};

enum class LawStatus : uint8_t {
  ok,
  not_finite,  // a logit is NaN or +inf
  empty,       // every logit is -inf: no token may follow
};

/// What law_row writes besides the law. Not shared between threads.
struct LawScratch {
  std::vector<uint32_t> keys;
  std::vector<int32_t> ids;
  std::vector<float> values;

  /// Makes room for rows of `vocab` logits (12 bytes each), so that law_row does not allocate.
  void reserve(int32_t vocab) {
    const size_t size = static_cast<size_t>(vocab);
    if (keys.size() >= size) return;
    values.resize(size);
    ids.resize(size);
    keys.resize(size);
  }
};

/// Writes the probabilities of one row of logits.
///
/// logits, p: (vocab,) float32, not overlapping. `scratch` should hold reserve(vocab): it is made to if it does not,
/// and the process ends if there is no memory. A logit of -inf gets no mass; ids from the limit on are not looked at.
/// Equal logits at the edge of a truncation are kept lowest id first, and -0 equals 0. Sums are float64 in a fixed
/// order and nothing depends on the instruction set: the same bits on every machine. A weight below exp(-87.3) of the
/// largest is 0. If the status is not ok, p is all zeros.
LawStatus law_row(const float* logits, int32_t vocab, const Law& law, float* p, LawScratch& scratch) noexcept;

/// The id of the largest of the first vocab_limit of n logits, the lowest id among equals; -1 if one of them is NaN.
/// A vocab_limit outside 1..n means n.
int32_t argmax_row(const float* logits, int32_t n, int32_t vocab_limit) noexcept;

/// The inverse CDF of p (vocab,), in token order, at u in [0, 1) of its total mass: never a token without mass,
/// whatever u. -1 if there is no mass or it is NaN.
int32_t sample_token(const float* p, int32_t vocab, double u) noexcept;

}  // namespace specfast
