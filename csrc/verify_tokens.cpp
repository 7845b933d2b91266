// The accept scan, and the draw of the residual or the bonus.
#include "verify_tokens.hpp"

#include "inverse_cdf.hpp"

namespace specfast {
namespace {

/// p - min(q, kept p), which is max(p - q, 0) for kept = 1. NaN stays NaN.
inline double residual(double p, double q, double kept) noexcept {
  const double most = kept * p;
  return p - (most < q ? most : q);
}

/// What the target has left where the draft has law q over Vq tokens.
struct Residual {
  const float* p;
  const float* q;
  int32_t Vq;
  double kept;

  double operator()(int32_t i) const noexcept {
    return residual(static_cast<double>(p[i]), i < Vq ? static_cast<double>(q[i]) : 0.0, kept);
  }
  double sum(int32_t first, int32_t last) const noexcept {
    if (last > Vq) return sum_in_lanes(first, last, *this);
    const auto both = [this](int32_t i) {
      return residual(static_cast<double>(p[i]), static_cast<double>(q[i]), kept);
    };
    return sum_in_lanes(first, last, both);
  }
};

/// What the target has left where the draft was certain of one token.
struct ResidualOfOneHot {
  const float* p;
  int32_t token;
  double kept;

  double operator()(int32_t i) const noexcept {
    return residual(static_cast<double>(p[i]), i == token ? 1.0 : 0.0, kept);
  }
  double sum(int32_t first, int32_t last) const noexcept {
    const LawWeights target{p};
    if (token < first || token >= last) return target.sum(first, last);
    return target.sum(first, token) + (*this)(token) + target.sum(token + 1, last);
  }
};

}  // namespace

Verdict verify_tokens(const float* p, int32_t V, const float* q, int32_t Vq, const int32_t* tokens, int32_t gamma,
                      const double* u, double lenience) noexcept {
  const float* p_row = p;
  const float* q_row = q;
  int32_t tau = 0;
  for (; tau < gamma; tau++) {
    const int32_t x = tokens[tau];
    const double px = x >= 0 && x < V ? static_cast<double>(p_row[x]) : 0.0;
    const double qx = !q ? 1.0 : x >= 0 && x < Vq ? static_cast<double>(q_row[x]) : 0.0;
    if (!(u[tau] * qx < lenience * px)) break;
    p_row += V;
    if (q) q_row += Vq;
  }
  int32_t next = -1;
  if (tau < gamma) {
    const double kept = lenience < 1.0 ? lenience : 1.0;
    next = q ? inverse_cdf(Residual{p_row, q_row, Vq, kept}, V, u[gamma])
             : inverse_cdf(ResidualOfOneHot{p_row, tokens[tau], kept}, V, u[gamma]);
  }
  if (next < 0) next = inverse_cdf(LawWeights{p_row}, V, u[gamma]);
  return {tau, next};
}

Verdict verify_greedy(const int32_t* best, const int32_t* tokens, int32_t gamma) noexcept {
  int32_t tau = 0;
  while (tau < gamma && tokens[tau] == best[tau]) tau++;
  return {tau, best[tau]};
}

}  // namespace specfast
