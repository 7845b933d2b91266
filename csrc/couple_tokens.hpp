// The coupled rule: target and draft choose under the same noise, so that a seed's text does not depend on the draft.
#pragma once

#include "law.hpp"
#include "types.hpp"
#include "verify_logits.hpp"

namespace specfast {

/// The noise of a token at a position of the text: an exponential number keyed (seed, position, token), the same bits
/// on every machine. -log of it is Gumbel noise: argmin(noise / p) is argmax(log p + Gumbel), a draw from p.
double noise_of(uint64_t seed, uint64_t position, int32_t token) noexcept;

/// Chooses argmin(noise / p) in every row, and keeps drafted tokens while they are those (Gumbel coupling: Daliri et
/// al. 2024, arXiv:2408.07978). With a draft that chose by the same noise from q, at least (1 - TV) / (1 + TV) are
/// kept.
///
/// p: (gamma + 1, V) float32, rows of any positive mass; tokens: (gamma,); row i is at position + i of the text. Among
/// equals the lowest id is chosen, never a token without mass. next_token is -1 if a row that is looked at has no mass.
Verdict couple_tokens(const LawLoops& loops, const float* p, int32_t V, const int32_t* tokens, int32_t gamma,
                      uint64_t seed, uint64_t position) noexcept;

/// couple_tokens on the laws of `logits`, except that weights are not normalised and so not rounded again: the choice
/// is another only where two noises over their weights agree to a part in 2^24. Rows after the first rejection are not
/// looked at. The other arguments, and what is thrown, are those of verify_logits.
Verdict couple_logits(const LawLoops& loops, bool alone, const float* logits, int32_t V, const RowMax* best,
                      const Law& law, const int32_t* tokens, int32_t gamma, uint64_t seed, uint64_t position,
                      VerifyScratch& scratch);

}  // namespace specfast
