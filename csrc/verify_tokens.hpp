// Which drafted tokens the target keeps, and the token it adds.
#pragma once

#include <cstdint>

#include "row_law.hpp"

namespace specfast {

/// How drafted tokens are accepted.
enum class Rule : uint8_t {
  token,    // one after the other; takes a lenience
  block,    // prefixes as a whole: keeps at least as many in expectation; needs the draft's laws
  coupled,  // where target and draft, under the same noise, choose the same token; see couple_tokens.hpp
};

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

/// The block rule (Sun et al. 2024, Alg. 2, arXiv:2403.10444); the arguments are verify_tokens', but q is not null (of
/// certain tokens the two rules keep the same, in law) and u[i] tests the prefix of i + 1 tokens.
///
/// With c_0 = 1 and c_i = min(1, c_(i-1) p(x_i) / q(x_i)), what is left after i < gamma tokens is s_i = sum(max(c_i p -
/// q, 0)). A prefix passes if u (s_i + 1 - c_i) < s_i, and all gamma tokens do if u < c_gamma. tau is the longest that
/// passes, 0 if none does; the residual is norm(max(c_tau p - q, 0)). Equal to the token rule at gamma 1.
Verdict verify_block(const LawLoops& loops, const float* p, int32_t V, const float* q, int32_t Vq,
                     const int32_t* tokens, int32_t gamma, const double* u) noexcept;

/// Whether the token rule keeps token x of row i, whose target law is `row`; the other arguments are verify_tokens'.
bool keeps(const LawLoops& loops, const RowLaw& row, const float* q, int32_t Vq, int32_t x, int32_t i, double u,
           double lenience) noexcept;

/// What the draft takes from row tau where the token rule rejected its token; nothing in the bonus row.
Drafted drafted_in(const float* q, int32_t Vq, const int32_t* tokens, int32_t gamma, int32_t tau,
                   double lenience) noexcept;

/// c_i of the block rule from c_(i-1), p(x_i) and q(x_i). NaN stays NaN; a token without target mass leaves 0.
inline double prefix_after(double prefix, double px, double qx) noexcept {
  const double most = prefix * px;
  if (most < qx) return most / qx;
  return most > 0 && most >= qx ? 1.0 : most - qx;
}

/// Whether a prefix of fewer than gamma tokens passes, given c and s of the block rule. No division, so that c = 1
/// passes whatever u, unless nothing is left.
inline bool prefix_passes(double prefix, double left, double u) noexcept {
  return u * (left + (1.0 - prefix)) < left;
}

/// What the draft takes from row i in the block rule, after a prefix; nothing in the bonus row.
inline Drafted drafted_after(const float* q, int32_t Vq, int32_t gamma, int32_t i, double prefix) noexcept {
  if (i == gamma) return {};
  return {q + static_cast<int64_t>(i) * Vq, Vq, -1, 1.0, prefix};
}

/// The draft's probability of token x in row i.
inline double drafted_probability(const float* q, int32_t Vq, int32_t x, int32_t i) noexcept {
  return x >= 0 && x < Vq ? static_cast<double>(q[static_cast<int64_t>(i) * Vq + x]) : 0.0;
}

/// Keeps drafted tokens while they are the target's arg max. best: (gamma + 1,), tokens: (gamma,).
Verdict verify_greedy(const int32_t* best, const int32_t* tokens, int32_t gamma) noexcept;

}  // namespace specfast
