// p (M, V) float32: the laws of M rows of logits at a temperature, bit for bit those of csrc/law.hpp.
//
// Three launches. law_weights: grid (ceil(V / 4096), M, 1), 256 threads: weights exp((logit - highest) / temperature)
// and their sums over chunks of 256 ids, binary64, 16 threads a chunk. law_scales: grid (M, 1, 1), 32 threads: 1 / the
// sum of all. law_rows: grid (ceil(V / 1024), M, 1), 256 threads: p, which may be the weights' buffer.
// best is logits_best's; dims = {V, limit, bits of the float 1 / temperature}: ids from `limit` on have no mass.
#include "law.h"

METAL_FUNC void law_weights_impl(device const float* logits, device const float* best, device float* weights,
                                 device ulong* masses, int V, int limit, float inverse_temperature, uint2 group,
                                 uint simdgroup, uint lane) {
  const int chunks = (V + CHUNK - 1) / CHUNK, chunk = int(group.x) * 16 + int(simdgroup) * 2 + int(lane) / 16;
  const float highest = best[4 * group.y];
  const size_t row = size_t(group.y) * V;
  ulong mass = 0;
  for (int i = 0; i < 16; i++) {
    const int id = chunk * CHUNK + i * 16 + int(lane) % 16;
    if (id >= V) break;
    const float weight = id < limit ? exp_of_negative((logits[row + id] - highest) * inverse_temperature) : 0.0f;
    weights[row + id] = weight;
    mass = b64_add(mass, b64_of(weight));
  }
  mass = sum_of_chunk(mass);
  if (lane % 16 == 0 && chunk < chunks) masses[size_t(group.y) * chunks + chunk] = mass;
}

METAL_FUNC void law_scales_impl(device const ulong* masses, device ulong* scales, int V, int limit, uint row,
                                uint lane) {
  if (lane > 0) return;
  const int chunks = (V + CHUNK - 1) / CHUNK;
  scales[row] = b64_divide(B64_ONE, total_of(masses + size_t(row) * chunks, limit));
}

METAL_FUNC void law_rows_impl(device const float* weights, device const ulong* scales, device float* p, int V,
                              uint2 group, uint thread_index) {
  const ulong scale = scales[group.y];
  for (int i = 0; i < 4; i++) {
    const int id = int(group.x) * 1024 + i * 256 + int(thread_index);
    if (id >= V) return;
    const size_t at = size_t(group.y) * V + id;
    p[at] = as_type<float>(b64_float_bits(b64_multiply(b64_of(weights[at]), scale)));
  }
}

#ifndef SPECFAST_NO_ENTRY
[[kernel]] void law_weights(device const float* logits [[buffer(0)]], device const float* best [[buffer(1)]],
                            device float* weights [[buffer(2)]], device ulong* masses [[buffer(3)]],
                            constant int* dims [[buffer(4)]], uint3 group [[threadgroup_position_in_grid]],
                            uint simdgroup [[simdgroup_index_in_threadgroup]],
                            uint lane [[thread_index_in_simdgroup]]) {
  law_weights_impl(logits, best, weights, masses, dims[0], dims[1], as_type<float>(dims[2]), group.xy, simdgroup,
                   lane);
}

[[kernel]] void law_scales(device const ulong* masses [[buffer(0)]], device ulong* scales [[buffer(1)]],
                           constant int* dims [[buffer(2)]], uint3 group [[threadgroup_position_in_grid]],
                           uint lane [[thread_index_in_simdgroup]]) {
  law_scales_impl(masses, scales, dims[0], dims[1], group.x, lane);
}

[[kernel]] void law_rows(device const float* weights [[buffer(0)]], device const ulong* scales [[buffer(1)]],
                         device float* p [[buffer(2)]], constant int* dims [[buffer(3)]],
                         uint3 group [[threadgroup_position_in_grid]],
                         uint thread_index [[thread_index_in_threadgroup]]) {
  law_rows_impl(weights, scales, p, dims[0], group.xy, thread_index);
}
#endif
