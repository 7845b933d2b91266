// The accept scans, and the draw of the residual or the bonus.
#include "verify_tokens.hpp"

namespace specfast {

bool keeps(const LawLoops& loops, const RowLaw& row, const float* q, int32_t Vq, int32_t x, int32_t i, double u,
           double lenience) noexcept {
  const double px = static_cast<double>(row.probability(loops, x));
  const double qx = q ? drafted_probability(q, Vq, x, i) : 1.0;
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

Verdict verify_block(const LawLoops& loops, const float* p, int32_t V, const float* q, int32_t Vq,
                     const int32_t* tokens, int32_t gamma, const double* u) noexcept {
  const Blocks blocks(V);
  double mass[Blocks::kMost];
  const auto row_of = [&](int32_t i) { return RowLaw{.count = V, .weights = p + static_cast<int64_t>(i) * V}; };
  int32_t tau = 0;
  double prefix = 1.0, prefix_of_tau = 1.0;
  for (int32_t i = 1; i <= gamma; i++) {
    const int32_t x = tokens[i - 1];
    prefix = prefix_after(prefix, static_cast<double>(row_of(i - 1).probability(loops, x)),
                          drafted_probability(q, Vq, x, i - 1));
    if (!(prefix > 0)) break;
    double left = prefix;
    if (i < gamma) {
      block_masses(loops, row_of(i), drafted_after(q, Vq, gamma, i, prefix), blocks, 0, blocks.count, mass);
      left = blocks.total(mass);
    }
    if (!(i < gamma ? prefix_passes(prefix, left, u[i - 1]) : u[i - 1] < prefix)) continue;
    tau = i;
    prefix_of_tau = prefix;
  }
  const RowLaw row = row_of(tau);
  int32_t next = draw_token(loops, row, drafted_after(q, Vq, gamma, tau, prefix_of_tau), V, u[gamma]);
  if (next < 0) next = draw_token(loops, row, Drafted{}, V, u[gamma]);
  return {tau, next};
}

Verdict verify_greedy(const int32_t* best, const int32_t* tokens, int32_t gamma) noexcept {
  int32_t tau = 0;
  while (tau < gamma && tokens[tau] == best[tau]) tau++;
  return {tau, best[tau]};
}

}  // namespace specfast
