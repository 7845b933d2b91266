// y (M, N) = x (M, K) W^T, M <= 9: a simdgroup gives OUTPUTS columns of all rows, weights are read once.
//
// Grid (ceil(N / (OUTPUTS * SIMDGROUPS)), 1, 1) threadgroups of 32 * SIMDGROUPS threads; dims = {N, K}.
#include "row_dots.h"

/// What becomes of a sum before it is rounded and stored; `operand` is (N,) or (M, N), and may be y.
enum Epilogue { STORE = 0, BIAS = 1, RESIDUAL = 2, SILU_MUL = 3 };

template <typename T, typename W, int M, int EPILOGUE, int OUTPUTS, int SIMDGROUPS>
METAL_FUNC void matmul_rows_impl(W w, device const T* x, device const T* operand, device T* y, int N, int K,
                                 uint group, uint simdgroup, uint lane) {
  const int first = (int(group) * SIMDGROUPS + int(simdgroup)) * OUTPUTS;
  if (first >= N) return;
  float sums[OUTPUTS][M];
  row_dots<T, W, M, OUTPUTS>(w, x, first, N, K, lane, sums);
  for (int r = 0; r < OUTPUTS; r++) {
    float value = own_sum<M>(sums[r], lane);
    if (lane >= uint(M) || first + r >= N) continue;
    const size_t at = size_t(lane) * N + first + r;
    if (EPILOGUE == BIAS) value = value + float(operand[first + r]);
    if (EPILOGUE == RESIDUAL) value = float(operand[at]) + value;
    if (EPILOGUE == SILU_MUL) value = silu(value) * float(operand[at]);
    y[at] = T(value);
  }
}

#ifndef SPECFAST_NO_ENTRY
template <typename T, typename W, int M, int EPILOGUE, int OUTPUTS, int SIMDGROUPS>
[[kernel]] void matmul_rows(device const uint* weight [[buffer(0)]], device const T* scales [[buffer(1)]],
                            device const T* biases [[buffer(2)]], device const T* x [[buffer(3)]],
                            device const T* operand [[buffer(4)]], device T* y [[buffer(5)]],
                            constant int* dims [[buffer(6)]], uint3 group [[threadgroup_position_in_grid]],
                            uint simdgroup [[simdgroup_index_in_threadgroup]],
                            uint lane [[thread_index_in_simdgroup]]) {
  W w;
  point_at(w, weight, scales, biases);
  matmul_rows_impl<T, W, M, EPILOGUE, OUTPUTS, SIMDGROUPS>(w, x, operand, y, dims[0], dims[1], group.x, simdgroup,
                                                           lane);
}
#endif
