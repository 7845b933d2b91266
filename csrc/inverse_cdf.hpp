// Drawing a token by inverse CDF from any non-negative weights, in token order and float64.
#pragma once

#include <cstdint>

namespace specfast {

/// Returns the first token whose running mass exceeds u times the total, skipping tokens without mass; -1 if the total
/// mass is 0 or not a number. `weight(i)` is called at most three times per token.
template <class Weight>
int32_t inverse_cdf(int32_t vocab, double u, Weight&& weight) noexcept {
  constexpr int32_t kBlocks = 512;
  double mass[kBlocks];
  const int32_t block = (vocab + kBlocks - 1) / kBlocks;
  const int32_t blocks = (vocab + block - 1) / block;
  double total = 0;
  for (int32_t b = 0; b < blocks; b++) {
    double sum[4] = {0, 0, 0, 0};
    const int32_t first = b * block, last = first + block < vocab ? first + block : vocab;
    int32_t i = first;
    for (; i + 4 <= last; i += 4) {
      for (int32_t j = 0; j < 4; j++) sum[j] += weight(i + j);
    }
    for (; i < last; i++) sum[0] += weight(i);
    mass[b] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    total += mass[b];
  }
  if (!(total > 0)) return -1;
  const double wanted = u * total;
  double before = 0;
  int32_t b = 0;
  while (b + 1 < blocks && before + mass[b] <= wanted) before += mass[b++];
  int32_t chosen = -1;
  for (int32_t i = b * block; i < vocab; i++) {  // rounding may carry the search into later blocks
    const double w = weight(i);
    if (!(w > 0)) continue;
    chosen = i;
    before += w;
    if (before > wanted) return chosen;
  }
  for (int32_t i = vocab; chosen < 0 && i-- > 0;) {
    if (weight(i) > 0) chosen = i;
  }
  return chosen;
}

}  // namespace specfast
