// h (M, N) = SiLU(x W_gate^T) * x W_up^T, M <= 9: both matrices are read once, side by side.
//
// Grid (ceil(N / (OUTPUTS * SIMDGROUPS)), 1, 1) threadgroups of 32 * SIMDGROUPS threads; dims = {N, K}.
#include "row_dots.h"

template <typename T, typename W, int M, int OUTPUTS, int SIMDGROUPS>
METAL_FUNC void swiglu_rows_impl(W gate, W up, device const T* x, device T* h, int N, int K, uint group,
                                 uint simdgroup, uint lane) {
  const int first = (int(group) * SIMDGROUPS + int(simdgroup)) * OUTPUTS;
  if (first >= N) return;
  float gates[OUTPUTS][M], ups[OUTPUTS][M];
  row_dots<T, W, M, OUTPUTS>(gate, x, first, N, K, lane, gates);
  row_dots<T, W, M, OUTPUTS>(up, x, first, N, K, lane, ups);
  for (int r = 0; r < OUTPUTS; r++) {
    const float value = silu(own_sum<M>(gates[r], lane)) * own_sum<M>(ups[r], lane);
    if (lane < uint(M) && first + r < N) h[size_t(lane) * N + first + r] = T(value);
  }
}

#ifndef SPECFAST_NO_ENTRY
template <typename T, typename W, int M, int OUTPUTS, int SIMDGROUPS>
[[kernel]] void swiglu_rows(device const uint* gate_weight [[buffer(0)]], device const T* gate_scales [[buffer(1)]],
                            device const T* gate_biases [[buffer(2)]], device const uint* up_weight [[buffer(3)]],
                            device const T* up_scales [[buffer(4)]], device const T* up_biases [[buffer(5)]],
                            device const T* x [[buffer(6)]], device T* h [[buffer(7)]],
                            constant int* dims [[buffer(8)]], uint3 group [[threadgroup_position_in_grid]],
                            uint simdgroup [[simdgroup_index_in_threadgroup]],
                            uint lane [[thread_index_in_simdgroup]]) {
  W gate, up;
  point_at(gate, gate_weight, gate_scales, gate_biases);
  point_at(up, up_weight, up_scales, up_biases);
  swiglu_rows_impl<T, W, M, OUTPUTS, SIMDGROUPS>(gate, up, x, h, dims[0], dims[1], group.x, simdgroup, lane);
}
#endif
