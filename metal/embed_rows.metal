// y (M, K) = the embeddings of M tokens, dequantised.
//
// Grid (ceil(K / 256), M, 1) threadgroups of 32 threads, 8 inputs each; dims = {V, K, first}: row m is tokens[first +
// m]. An id outside the vocabulary, which a failed draw leaves, is read as the nearest one inside.
#include "row_dots.h"

template <typename T, typename W>
METAL_FUNC void embed_rows_impl(W w, device const int* tokens, device T* y, int V, int K, int first, uint2 group,
                                uint lane) {
  const int k = (int(group.x) * 32 + int(lane)) * 8, token = clamp(tokens[first + int(group.y)], 0, V - 1);
  if (k >= K) return;
  Step<W> step;
  load_step(w, token, k / W::step * W::step, K, step);
  float4 low, high;
  weights_of(step, k % W::step / 8, low, high);
  device T* out = y + size_t(group.y) * K + k;
  for (int i = 0; i < 4; i++) {
    out[i] = T(low[i]);
    out[i + 4] = T(high[i]);
  }
}

#ifndef SPECFAST_NO_ENTRY
template <typename T, typename W>
[[kernel]] void embed_rows(device const uint* weight [[buffer(0)]], device const T* scales [[buffer(1)]],
                           device const T* biases [[buffer(2)]], device const int* tokens [[buffer(3)]],
                           device T* y [[buffer(4)]], constant int* dims [[buffer(5)]],
                           uint3 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  W w;
  point_at(w, weight, scales, biases);
  embed_rows_impl<T, W>(w, tokens, y, dims[0], dims[1], dims[2], group.xy, lane);
}
#endif
