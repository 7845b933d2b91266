// y (M, K) = x / rms(x) * weight: RMSNorm, what qkv_rope_append, swiglu_rows and logits_rows multiply.
//
// Grid (M, 1, 1): a threadgroup of 32 * SIMDGROUPS threads has one row; dims = {K, bits of the float eps}.
#include <metal_stdlib>
using namespace metal;
#pragma METAL fp contract(off)
#pragma METAL fp math_mode(safe)

template <typename T, int SIMDGROUPS>
METAL_FUNC void norm_rows_impl(device const T* x, device const T* weight, device T* y, int K, float eps,
                               threadgroup float* squares, uint row, uint simdgroup, uint lane) {
  device const T* in = x + size_t(row) * K;
  float sum = 0.0f;
  for (int k = int(simdgroup * 32 + lane); k < K; k += SIMDGROUPS * 32) sum = fma(float(in[k]), float(in[k]), sum);
  sum = simd_sum(sum);
  if (lane == 0) squares[simdgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = 0.0f;
  for (int s = 0; s < SIMDGROUPS; s++) total = total + squares[s];
  const float inverse = 1.0f / precise::sqrt(total / float(K) + eps);
  for (int k = int(simdgroup * 32 + lane); k < K; k += SIMDGROUPS * 32)
    y[size_t(row) * K + k] = T(float(in[k]) * inverse * float(weight[k]));
}

#ifndef SPECFAST_NO_ENTRY
template <typename T, int SIMDGROUPS>
[[kernel]] void norm_rows(device const T* x [[buffer(0)]], device const T* weight [[buffer(1)]],
                          device T* y [[buffer(2)]], constant int* dims [[buffer(3)]],
                          uint3 group [[threadgroup_position_in_grid]],
                          uint simdgroup [[simdgroup_index_in_threadgroup]],
                          uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float squares[SIMDGROUPS];
  norm_rows_impl<T, SIMDGROUPS>(x, weight, y, dims[0], as_type<float>(dims[1]), squares, group.x, simdgroup, lane);
}
#endif
