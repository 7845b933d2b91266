// The accept scan, and the draw of the residual or the bonus.
#include "verify_tokens.hpp"

namespace specfast {

bool keeps(const LawLoops& loops, const RowLaw& row, const float* q, int32_t Vq, int32_t x, int32_t i, double u,
           double lenience) noexcept {
  const double px = static_cast<double>(row.probability(loops, x));
  const double qx = !q ? 1.0 : x >= 0 && x < Vq ? static_cast<double>(q[static_cast<int64_t>(i) * Vq + x]) : 0.0;
  return u * qx < lenience * px;
}

Drafted drafted_in(const float* q, int32_t Vq, const int32_t* tokens, int32_t gamma, int32_t tau,
                   double lenience) noexcept {
  if (tau == gamma) return {};
  const double kept = lenience < 1.0 ? lenience : 1.0;
  if (!q) return {nullptr, 0, tokens[tau], kept};
  return {q + static_cast<int64_t>(tau) * Vq, Vq, -1, kept};
}

Verdict verify_tokens(const LawLoops& loops, const float* p, int32_t V, const float* q, int32_t Vq,
                      const int32_t* tokens, int32_t gamma, const double* u, double lenience) noexcept {
  RowLaw row{.count = V, .weights = p};
  int32_t tau = 0;
  for (; tau < gamma && keeps(loops, row, q, Vq, tokens[tau], tau, u[tau], lenience); tau++) row.weights += V;
  int32_t next = draw_token(loops, row, drafted_in(q, Vq, tokens, gamma, tau, lenience), V, u[gamma]);
  if (next < 0) next = draw_token(loops, row, Drafted{}, V, u[gamma]);
  return {tau, next};
}

Verdict verify_greedy(const int32_t* best, const int32_t* tokens, int32_t gamma) noexcept {
  int32_t tau = 0;
  while (tau < gamma && tokens[tau] == best[tau]) tau++;
  return {tau, best[tau]};
}

}  // namespace specfast
