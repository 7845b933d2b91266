// From logits to the law that is sampled: temperature, then top-k, top-p and min-p.
#pragma once

#include <vector>

#include "kernels.hpp"

namespace specfast {

/// How logits become probabilities. Temperature 0 means greedy: the arg max, without a law.
struct Law {
  float temperature = 1.0f;
  int32_t top_k = 0;    // keep the k largest logits; 0 keeps all
  float top_p = 1.0f;   // then keep the smallest set with at least this mass
  float min_p = 0.0f;   // then drop what is below this fraction of the largest probability
  int32_t vocab_limit = 0;  // ids from here on get no mass (padded vocabulary rows); 0 means none are cut

  bool greedy() const { return temperature == 0.0f; }
  int32_t limit(int32_t vocab) const { return vocab_limit > 0 && vocab_limit < vocab ? vocab_limit : vocab; }
};

enum class LawStatus { ok, not_finite, empty };

/// Buffers law_row fills; reused between calls.
struct LawScratch {
  std::vector<float> values;
  std::vector<int32_t> ids;
};

/// Writes the probabilities of one row of logits.
///
/// logits, p: (vocab,) float32; p may not alias logits. Sums are float64 in token order. Equal logits at the edge of a
/// truncation are kept lowest id first. Returns not_finite on NaN or +inf, empty when every logit is -inf.
LawStatus law_row(const KernelTable& kernels, const float* logits, int32_t vocab, const Law& law, float* p,
                  LawScratch& scratch);

/// The inverse CDF of p (vocab,), in token order, at u in [0, 1) of its total mass; never a token without mass.
/// -1 if there is no mass at all.
int32_t sample_token(const float* p, int32_t vocab, double u) noexcept;

}  // namespace specfast
