// The loops over rows of logits and of laws that every instruction set compiles for itself.
#pragma once

#include <cstdint>

namespace specfast {

/// Float64 sums a row is added up in: element i of a block goes to sum i % kSumLanes, whatever the vector width.
inline constexpr int kSumLanes = 16;

/// Loops over n floats. All give the same bits in every table: no fused multiply-adds, sums in kSumLanes lanes.
struct LawLoops {
  /// The largest of n floats: -infinity of none, NaN if one is NaN.
  float (*highest)(const float* x, int n);
  /// w[i] = exp((x[i] - highest) / temperature) within 2 ulp for x[i] <= highest, 0 below exp(-87.3); w may be x.
  void (*weigh)(const float* x, int n, float highest, float temperature, float* w);
  /// p[i] = w[i] * scale, rounded once; p may be w.
  void (*normalise)(const float* w, int n, double scale, float* p);
  /// lane[i % kSumLanes] += p[i].
  void (*add_mass)(const float* p, int n, double* lane);
  /// lane[i % kSumLanes] += p[i] - min(q[i], kept p[i]); a NaN q stays NaN.
  void (*add_residual)(const float* p, const float* q, double kept, int n, double* lane);
  /// Writes the i with x[i] >= least, ascending, and returns how many; ids has room for n + 16.
  int (*at_least)(const float* x, int n, float least, int32_t* ids);
};

}  // namespace specfast
