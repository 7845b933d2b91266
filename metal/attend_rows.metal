// Causal attention of M rows, M <= 9, over the cache: keys and values are read once for all rows and heads of a group.
//
// attend_rows: grid (kv_heads, spans, chunks): a threadgroup has SPAN positions of one kv head. Tiles of 32 keys, and
// then their values, are staged in threadgroup memory, where every simdgroup meets them with QUERIES queries of its own
// (query n is row n / group, head n % group of the kv head): lane = key for the scores, lane = dimension for the sums.
// Tiles and spans lie at fixed absolute positions and a row's sums are taken in order of position, so its bits depend
// on neither M nor the grid. partial (spans, M, heads, DIM + 2) float32: sums, maximum, total.
// attend_spans: grid (heads, M, 1), 32 threads: joins the spans of a row and head in order.
// q (M, heads, DIM), caches (kv_heads, capacity, DIM). Row m sees positions up to state[1] + ahead + m;
// dims = {M, heads, kv_heads, capacity, ahead}. A threadgroup has ceil(M * group / chunks / QUERIES) simdgroups or more.
#include <metal_stdlib>
using namespace metal;
#pragma METAL fp contract(off)
#pragma METAL fp math_mode(safe)

constant constexpr int SPAN = 256;
constant constexpr int TILE = 32;

/// Elements between keys of a staged tile: lanes that read their own key then meet different banks.
template <int DIM>
METAL_FUNC constexpr int staged_stride() {
  return DIM + 4;
}

/// Stages positions [first, first + TILE) of one head; those from `end` on become 0.
template <typename T, int DIM>
METAL_FUNC void stage(device const T* rows, int first, int end, threadgroup T* tile, uint thread_index, uint threads) {
  for (int i = int(thread_index); i < TILE * (DIM / 4); i += int(threads)) {
    const int j = i / (DIM / 4), d = i % (DIM / 4) * 4;
    vec<T, 4> four = vec<T, 4>(T(0.0f));
    if (first + j < end) four = *(device const vec<T, 4>*)(rows + size_t(first + j) * DIM + d);
    *(threadgroup vec<T, 4>*)(tile + j * staged_stride<DIM>() + d) = four;
  }
}

template <typename T, int DIM, int QUERIES>
METAL_FUNC void attend_rows_impl(device const T* q, device const T* keys, device const T* values,
                                 device float* partial, int M, int heads, int kv_heads, int capacity, int length,
                                 threadgroup T* tile, uint3 group, uint3 groups, uint simdgroup, uint simdgroups,
                                 uint lane) {
  constexpr int SLICES = (DIM + 31) / 32;  // dimensions of a lane
  const int span = int(group.y), begin = span * SPAN, seen = length + M;
  if (begin >= seen) return;
  const int share = heads / kv_heads, queries = M * share;
  const int each = (queries + int(groups.z) - 1) / int(groups.z);
  const int first = int(group.z) * each + int(simdgroup) * QUERIES;
  const int last = min(queries, (int(group.z) + 1) * each);
  device const T* head_keys = keys + size_t(group.x) * capacity * DIM;
  device const T* head_values = values + size_t(group.x) * capacity * DIM;
  const uint thread_index = simdgroup * 32 + lane, threads = simdgroups * 32;
  const float scale = 1.0f / precise::sqrt(float(DIM));

  device const T* query[QUERIES];
  int bound[QUERIES];  // positions below it are seen
  float top[QUERIES], total[QUERIES], sums[QUERIES][SLICES];
  for (int i = 0; i < QUERIES; i++) {
    const int n = min(first + i, queries - 1);
    query[i] = q + (size_t(n / share) * heads + group.x * share + n % share) * DIM;
    bound[i] = first + i < last ? length + n / share + 1 : 0;
    top[i] = -INFINITY;
    total[i] = 0.0f;
    for (int s = 0; s < SLICES; s++) sums[i][s] = 0.0f;
  }

  for (int position = begin; position < min(begin + SPAN, seen); position += TILE) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage<T, DIM>(head_keys, position, seen, tile, thread_index, threads);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float weight[QUERIES];
    for (int i = 0; i < QUERIES; i++) weight[i] = 0.0f;
    for (int d = 0; d < DIM; d += 4) {
      const float4 key = float4(*(threadgroup const vec<T, 4>*)(tile + int(lane) * staged_stride<DIM>() + d));
      for (int i = 0; i < QUERIES; i++) {
        const float4 in = float4(*(device const vec<T, 4>*)(query[i] + d));
        for (int e = 0; e < 4; e++) weight[i] = fma(in[e], key[e], weight[i]);
      }
    }
    for (int i = 0; i < QUERIES; i++) {
      if (position >= bound[i]) continue;
      const bool visible = position + int(lane) < bound[i];
      const float score = visible ? weight[i] * scale : -INFINITY;
      const float higher = max(top[i], simd_max(score));
      const float kept = precise::exp(top[i] - higher);  // 0 at first
      weight[i] = visible ? precise::exp(score - higher) : 0.0f;
      total[i] = fma(total[i], kept, simd_sum(weight[i]));
      for (int s = 0; s < SLICES; s++) sums[i][s] = sums[i][s] * kept;
      top[i] = higher;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage<T, DIM>(head_values, position, seen, tile, thread_index, threads);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int j = 0; j < TILE; j++) {
      float value[SLICES];
      for (int s = 0; s < SLICES; s++) {
        const int d = s * 32 + int(lane);
        value[s] = d < DIM ? float(tile[j * staged_stride<DIM>() + d]) : 0.0f;
      }
      for (int i = 0; i < QUERIES; i++) {
        if (position + j >= bound[i]) continue;
        const float own = simd_shuffle(weight[i], ushort(j));
        for (int s = 0; s < SLICES; s++) sums[i][s] = fma(own, value[s], sums[i][s]);
      }
    }
  }

  for (int i = 0; i < QUERIES; i++) {
    if (bound[i] <= begin) continue;
    const int n = first + i;
    device float* out = partial + ((size_t(span) * M + n / share) * heads + group.x * share + n % share) * (DIM + 2);
    for (int s = 0; s < SLICES; s++) {
      const int d = s * 32 + int(lane);
      if (d < DIM) out[d] = sums[i][s];
    }
    if (lane == 0) {
      out[DIM] = top[i];
      out[DIM + 1] = total[i];
    }
  }
}

template <typename T, int DIM>
METAL_FUNC void attend_spans_impl(device const float* partial, device T* out, int M, int heads, int length, uint head,
                                  uint row, uint lane) {
  constexpr int SLICES = (DIM + 31) / 32;
  const int spans = (length + int(row)) / SPAN + 1;
  const size_t stride = size_t(M) * heads * (DIM + 2);
  device const float* part = partial + (size_t(row) * heads + head) * (DIM + 2);
  float top = -INFINITY, total = 0.0f, sums[SLICES];
  for (int s = 0; s < spans; s++) top = max(top, part[s * stride + DIM]);
  for (int s = 0; s < SLICES; s++) sums[s] = 0.0f;
  for (int p = 0; p < spans; p++) {
    const float factor = precise::exp(part[p * stride + DIM] - top);
    total = fma(factor, part[p * stride + DIM + 1], total);
    for (int s = 0; s < SLICES; s++) {
      const int d = s * 32 + int(lane);
      if (d < DIM) sums[s] = fma(factor, part[p * stride + d], sums[s]);
    }
  }
  for (int s = 0; s < SLICES; s++) {
    const int d = s * 32 + int(lane);
    if (d < DIM) out[(size_t(row) * heads + head) * DIM + d] = T(sums[s] / total);
  }
}

#ifndef SPECFAST_NO_ENTRY
template <typename T, int DIM, int QUERIES>
[[kernel]] void attend_rows(device const T* q [[buffer(0)]], device const T* keys [[buffer(1)]],
                            device const T* values [[buffer(2)]], device const int* state [[buffer(3)]],
                            device float* partial [[buffer(4)]], constant int* dims [[buffer(5)]],
                            uint3 group [[threadgroup_position_in_grid]], uint3 groups [[threadgroups_per_grid]],
                            uint simdgroup [[simdgroup_index_in_threadgroup]],
                            uint simdgroups [[simdgroups_per_threadgroup]],
                            uint lane [[thread_index_in_simdgroup]]) {
  threadgroup T tile[TILE * (DIM + 4)];
  attend_rows_impl<T, DIM, QUERIES>(q, keys, values, partial, dims[0], dims[1], dims[2], dims[3], state[1] + dims[4],
                                    tile, group, groups, simdgroup, simdgroups, lane);
}

template <typename T, int DIM>
[[kernel]] void attend_spans(device const float* partial [[buffer(0)]], device const int* state [[buffer(1)]],
                             device T* out [[buffer(2)]], constant int* dims [[buffer(3)]],
                             uint3 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  attend_spans_impl<T, DIM>(partial, out, dims[0], dims[1], state[1] + dims[4], group.x, group.y, lane);
}
#endif
