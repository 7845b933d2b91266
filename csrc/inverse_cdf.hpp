// Drawing a token by inverse CDF from non-negative weights, in token order and float64.
#pragma once

#include <cstdint>

namespace specfast {

/// Sums f(i) over [first, last) in eight interleaved float64 sums and a tail, an order that no vector width changes.
template <class F>
inline double sum_in_lanes(int32_t first, int32_t last, const F& f) noexcept {
  double lane[8] = {}, tail = 0;
  int32_t i = first;
  for (; i + 8 <= last; i += 8) {
    for (int32_t j = 0; j < 8; j++) lane[j] += f(i + j);
  }
  for (; i < last; i++) tail += f(i);
  return (((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]))) + tail;
}

/// A law p (vocab,) as weights.
struct LawWeights {
  const float* p;

  double operator()(int32_t i) const noexcept { return static_cast<double>(p[i]); }
  double sum(int32_t first, int32_t last) const noexcept { return sum_in_lanes(first, last, *this); }
};

/// Returns the first token whose running weight exceeds u times the total; never one without weight, whatever u and the
/// rounding. -1 if the total is 0 or NaN.
///
/// `weights(i)` is the weight of token i and `weights.sum(first, last)` that of a block of tokens, up to rounding.
template <class Weights>
int32_t inverse_cdf(const Weights& weights, int32_t vocab, double u) noexcept {
  constexpr int32_t kBlocks = 512;
  double mass[kBlocks];
  const int32_t size = (vocab / kBlocks + 8) / 8 * 8;
  const int32_t blocks = (vocab + size - 1) / size;
  double total = 0;
  for (int32_t b = 0; b < blocks; b++) {
    const int32_t last = vocab - b * size < size ? vocab : (b + 1) * size;
    mass[b] = weights.sum(b * size, last);
    total += mass[b];
  }
  if (!(total > 0)) return -1;

  const double wanted = u * total;
  double before = 0, running = 0;
  int32_t block = -1;  // the one that holds the token: without rounding the first to pass `wanted`
  for (int32_t b = 0; b < blocks && (block < 0 || !(running > wanted)); b++) {
    if (!(mass[b] > 0)) continue;
    block = b;
    before = running;
    running += mass[b];
  }
  int32_t token = -1;
  for (int32_t i = block * size; i < vocab; i++) {
    if (i == (block + 1) * size && token >= 0) break;
    const double weight = weights(i);
    if (!(weight > 0)) continue;
    token = i;
    before += weight;
    if (before > wanted) break;
  }
  return token;
}

}  // namespace specfast
