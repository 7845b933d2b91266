// Which drafted tokens the target keeps, and the token it adds.
#pragma once

#include <cstdint>

#include "row_law.hpp"

namespace specfast {

/// tau drafted tokens are kept, next_token follows them.
struct Verdict {
  int32_t tau = 0;
  int32_t next_token = -1;
};

/// The token rule (Leviathan et al. 2022, Alg. 1, arXiv:2211.17192) with lenience L.
///
/// p: (gamma + 1, V) float32, the target's laws; q: (gamma, Vq) float32, the laws the tokens were drawn from, or null
/// when each was certain (one-hot); ids from Vq on have no draft mass. tokens: (gamma,); u: (gamma + 1,) in [0, 1):
/// u[i] tests token i, u[gamma] draws the residual or the bonus by inverse CDF in token order.
///
/// Accepts x while u q(x) < L p(x), in float64; a token outside 0..V-1 has no mass. The residual is
/// norm(p - min(q, L p)) for L <= 1, which leaves the target's law exact, and norm(max(p - q, 0)) for L > 1, where no
/// token gets more than L p. A residual whose mass is 0 or NaN falls back to p. next_token is -1 only if p itself has
/// no mass or is NaN.
Verdict verify_tokens(const LawLoops& loops, const float* p, int32_t V, const float* q, int32_t Vq,
                      const int32_t* tokens, int32_t gamma, const double* u, double lenience) noexcept;

/// Whether the rule keeps token x of row i, whose target law is `row`; the other arguments are verify_tokens'.
bool keeps(const LawLoops& loops, const RowLaw& row, const float* q, int32_t Vq, int32_t x, int32_t i, double u,
           double lenience) noexcept;

/// What the draft takes from row tau where the rule rejected its token; nothing in the bonus row.
Drafted drafted_in(const float* q, int32_t Vq, const int32_t* tokens, int32_t gamma, int32_t tau,
                   double lenience) noexcept;

/// Keeps drafted tokens while they are the target's arg max. best: (gamma + 1,), tokens: (gamma,).
Verdict verify_greedy(const int32_t* best, const int32_t* tokens, int32_t gamma) noexcept;

}  // namespace specfast
