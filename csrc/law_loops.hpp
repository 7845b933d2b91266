// The loops over rows of logits and of laws that every instruction set compiles for itself.
#pragma once

#include <cstdint>

namespace specfast {

/// Ids that are summed together, and the float64 sums they are added up in, whatever the vector width: element i goes
/// to sum i % kSumLanes, and then the upper half of the sums is added to the lower half until one is left.
inline constexpr int kChunk = 256, kSumLanes = 16;

/// Loops over n floats. All give the same bits in every table: no fused multiply-adds, sums in a fixed order.
struct LawLoops {
  /// The largest of n floats: -infinity of none, NaN if one is NaN.
  float (*highest)(const float* x, int n);
  /// w[i] = exp((x[i] - highest) inverse_temperature) within 2 ulp for x[i] <= highest, 0 below exp(-87.3); w may be x.
  void (*weigh)(const float* x, int n, float highest, float inverse_temperature, float* w);
  /// p[i] = w[i] * scale, rounded once; p may be w.
  void (*normalise)(const float* w, int n, double scale, float* p);
  /// sum(p[i]); n <= kChunk.
  double (*mass)(const float* p, int n);
  /// sum(c p - min(q[i], kept c p)) with c the prefix and p = w[i] * scale rounded to float; n <= kChunk. A NaN q stays
  /// NaN.
  double (*residual_mass)(const float* w, double scale, const float* q, double prefix, double kept, int n);
  /// Writes the i with x[i] >= least, ascending, and returns how many; ids has room for n + 16.
  int (*at_least)(const float* x, int n, float least, int32_t* ids);
  /// Writes noise_word of the tokens of `groups` groups of kNoiseGroup, the first of them `group`.
  void (*noise)(uint64_t seed, uint64_t position, int group, int groups, uint32_t* words);
  /// Whether a word / 2 is at most bound * w, for one of n.
  bool (*any_within)(const uint32_t* words, const float* w, int n, float bound);
};

}  // namespace specfast
