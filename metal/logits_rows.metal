// logits (M, V) float32 = x (M, K) W^T, and while the head streams each row's maximum, its id and sum(exp).
//
// logits_rows: grid (ceil(V / 256), 1, 1) threadgroups of 32 * SIMDGROUPS threads, 256 ids each; parts (M, ceil(V /
// 256)) hold the maximum, its id, whether a logit is no finite number, and sum(exp(logit - maximum)). dims = {V, K,
// limit}: ids from `limit` on take no part. logits_best: grid (M, 1, 1), 32 threads, joins the parts of a row in order
// of ids to best (M,).
#include "row_dots.h"

constant constexpr int IDS = 256;

struct RowPart {
  float highest;
  int id;         // the lowest among equals; -1: none
  float poison;   // 0, or NaN
  float sum;      // of exp(logit - highest)
};

/// Joins the part of higher ids to that of lower ones.
METAL_FUNC void join(thread RowPart& a, RowPart b) {
  a.poison = a.poison + b.poison;
  if (b.id < 0) return;
  const bool higher = a.id < 0 || b.highest > a.highest;
  const float top = higher ? b.highest : a.highest;
  const float of_a = a.id < 0 ? 0.0f : a.sum * precise::exp(a.highest - top);
  a.sum = of_a + b.sum * precise::exp(b.highest - top);
  a.highest = top;
  a.id = higher ? b.id : a.id;
}

/// A part as it is stored; ids up to 2^24 are exact.
METAL_FUNC float4 packed(RowPart part) {
  return float4(part.highest, float(part.id), part.poison, part.sum);
}
METAL_FUNC RowPart unpacked(float4 stored) {
  RowPart part;
  part.highest = stored.x;
  part.id = int(stored.y);
  part.poison = stored.z;
  part.sum = stored.w;
  return part;
}
METAL_FUNC RowPart no_part() {
  return unpacked(float4(0.0f, -1.0f, 0.0f, 0.0f));
}

METAL_FUNC RowPart part_of(float logit, int id, bool counts) {
  RowPart part;
  part.highest = logit;
  part.id = counts && logit > -INFINITY ? id : -1;
  part.poison = counts ? logit - logit : 0.0f;
  part.sum = 1.0f;
  return part;
}

template <typename T, typename W, int M, int OUTPUTS, int SIMDGROUPS>
METAL_FUNC void logits_rows_impl(W w, device const T* x, device float* logits, device float* parts, int V, int K,
                                 int limit, threadgroup float4* shared, uint group, uint groups, uint simdgroup,
                                 uint lane) {
  RowPart own = no_part();
  const int begin = int(group) * IDS + int(simdgroup) * (IDS / SIMDGROUPS), end = min(begin + IDS / SIMDGROUPS, V);
  for (int first = begin; first < end; first += OUTPUTS) {
    float sums[OUTPUTS][M];
    row_dots<T, W, M, OUTPUTS>(w, x, first, V, K, lane, sums);
    for (int r = 0; r < OUTPUTS && first + r < V; r++) {
      const float logit = own_sum<M>(sums[r], lane);
      if (lane < uint(M)) logits[size_t(lane) * V + first + r] = logit;
      join(own, part_of(logit, first + r, first + r < limit));
    }
  }
  if (lane < uint(M)) shared[simdgroup * M + lane] = packed(own);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup > 0 || lane >= uint(M)) return;
  for (int s = 1; s < SIMDGROUPS; s++) join(own, unpacked(shared[s * M + lane]));
  ((device float4*)parts)[lane * groups + group] = packed(own);
}

METAL_FUNC void logits_best_impl(device const float* parts, device float* best, int count, uint row, uint lane) {
  RowPart own = no_part();
  const int share = (count + 31) / 32;  // neighbours, so that joining lanes keeps ids in order
  for (int i = int(lane) * share; i < min((int(lane) + 1) * share, count); i++)
    join(own, unpacked(((device const float4*)parts)[int(row) * count + i]));
  for (ushort step = 1; step < 32; step *= 2) {
    float4 other = packed(own);
    for (int i = 0; i < 4; i++) other[i] = simd_shuffle_down(other[i], step);
    if (lane % (2 * step) == 0) join(own, unpacked(other));
  }
  if (lane == 0) ((device float4*)best)[row] = packed(own);
}

#ifndef SPECFAST_NO_ENTRY
template <typename T, typename W, int M, int OUTPUTS, int SIMDGROUPS>
[[kernel]] void logits_rows(device const uint* weight [[buffer(0)]], device const T* scales [[buffer(1)]],
                            device const T* biases [[buffer(2)]], device const T* x [[buffer(3)]],
                            device float* logits [[buffer(4)]], device float* parts [[buffer(5)]],
                            constant int* dims [[buffer(6)]], uint3 group [[threadgroup_position_in_grid]],
                            uint3 groups [[threadgroups_per_grid]],
                            uint simdgroup [[simdgroup_index_in_threadgroup]],
                            uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float4 shared[SIMDGROUPS * M];
  W w;
  point_at(w, weight, scales, biases);
  logits_rows_impl<T, W, M, OUTPUTS, SIMDGROUPS>(w, x, logits, parts, dims[0], dims[1], dims[2], shared, group.x,
                                                 groups.x, simdgroup, lane);
}

[[kernel]] void logits_best(device const float* parts [[buffer(0)]], device float* best [[buffer(1)]],
                            constant int* dims [[buffer(2)]], uint3 group [[threadgroup_position_in_grid]],
                            uint lane [[thread_index_in_simdgroup]]) {
  logits_best_impl(parts, best, dims[0], group.x, lane);
}
#endif
