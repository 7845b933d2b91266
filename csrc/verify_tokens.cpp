// Accept scan, residual draw and bonus draw.
#include "verify_tokens.hpp"

#include <algorithm>

#include "inverse_cdf.hpp"

namespace specfast {

Verdict verify_tokens(const float* p, int32_t V, const float* q, int32_t Vq, const int32_t* tokens, int32_t gamma,
                      const double* u, double lenience) noexcept {
  int32_t tau = 0;
  for (; tau < gamma; tau++) {
    const int32_t x = tokens[tau];
    const double px = static_cast<double>(p[static_cast<int64_t>(tau) * V + x]);
    const double qx = q ? (x < Vq ? static_cast<double>(q[static_cast<int64_t>(tau) * Vq + x]) : 0.0) : 1.0;
    if (!(u[tau] * qx < lenience * px)) break;
  }
  const float* row = p + static_cast<int64_t>(tau) * V;
  const auto law = [row](int32_t i) { return static_cast<double>(row[i]); };
  int32_t next = -1;
  if (tau < gamma) {
    const float* draft = q ? q + static_cast<int64_t>(tau) * Vq : nullptr;
    const int32_t rejected = tokens[tau];
    next = inverse_cdf(V, u[gamma], [&](int32_t i) {
      const double pi = law(i);
      const double qi = draft ? (i < Vq ? static_cast<double>(draft[i]) : 0.0) : (i == rejected ? 1.0 : 0.0);
      return std::max(pi - (lenience <= 1.0 ? std::min(qi, lenience * pi) : qi), 0.0);
    });
  }
  if (next < 0) next = inverse_cdf(V, u[gamma], law);
  return {tau, next};
}

Verdict verify_greedy(const int32_t* best, const int32_t* tokens, int32_t gamma) noexcept {
  int32_t tau = 0;
  while (tau < gamma && tokens[tau] == best[tau]) tau++;
  return {tau, best[tau]};
}

}  // namespace specfast
