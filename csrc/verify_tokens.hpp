// The rejection-sampling law: which drafted tokens the target keeps, and the token it adds.
#pragma once

#include <cstdint>

namespace specfast {

/// tau drafted tokens are kept, next_token follows them.
struct Verdict {
  int32_t tau = 0;
  int32_t next_token = -1;
};

/// The token rule (Leviathan et al. 2022, Alg. 1, arXiv:2211.17192) with lenience L.
///
/// p: (gamma + 1, V) float32, the target's laws; q: (gamma, Vq) float32, the draft's, or null when the drafter has none
/// (one-hot); tokens: (gamma,); u: (gamma + 1,) in [0, 1): u[i] tests token i, the last one draws the residual or the
/// bonus by inverse CDF in token order. Accepts while u q < L p. The residual is norm(max(p - min(q, L p), 0)) for L <= 1,
/// which leaves the target's law exact, and norm(max(p - q, 0)) for L > 1, which gives no token more than L p. A residual without
/// mass falls back to p. next_token is -1 only if p itself has no mass.
Verdict verify_tokens(const float* p, int32_t V, const float* q, int32_t Vq, const int32_t* tokens, int32_t gamma,
                      const double* u, double lenience) noexcept;

/// Greedy verification: keeps drafted tokens while they are the target's arg max; best: (gamma + 1,).
Verdict verify_greedy(const int32_t* best, const int32_t* tokens, int32_t gamma) noexcept;

}  // namespace specfast
