// Q, K and V of M rows, M <= 9: projection, bias or QK-norm, RoPE, and the append to the KV cache, in one launch.
//
// Grid (heads + 2 kv_heads, 1, 1): a threadgroup of 32 * SIMDGROUPS threads has one head of q, k or v, and reads its
// weights once for all rows. x (M, K) is normed. q (M, heads, DIM), the caches (kv_heads, capacity, DIM). bias is
// (heads + 2 kv_heads, DIM), norms (2, DIM): of q and of k. state[0] is the position of row 0, state[1] its slot.
// dims = {K, heads, kv_heads, capacity, ahead, bits of the float eps}; `ahead` is added to both.
#include "row_dots.h"

/// What comes between projection and RoPE.
enum Between { NOTHING = 0, BIAS = 1, QK_NORM = 2 };

/// RoPE of a head: pairs (d, d + DIM / 2), by the angle position * inv_freq[d].
template <int DIM>
METAL_FUNC void rope_head(threadgroup float* head, device const float* inv_freq, float position, uint lane) {
  for (int d = int(lane); d < DIM / 2; d += 32) {
    const float angle = position * inv_freq[d], c = precise::cos(angle), s = precise::sin(angle);
    const float a = head[d], b = head[d + DIM / 2];
    const float ac = a * c, bs = b * s, bc = b * c, as = a * s;
    head[d] = ac - bs;
    head[d + DIM / 2] = bc + as;
  }
}

template <int DIM, typename T>
METAL_FUNC void norm_head(threadgroup float* head, device const T* weight, float eps, uint lane) {
  float sum = 0.0f;
  for (int d = int(lane); d < DIM; d += 32) sum = fma(head[d], head[d], sum);
  const float inverse = 1.0f / precise::sqrt(simd_sum(sum) / float(DIM) + eps);
  for (int d = int(lane); d < DIM; d += 32) head[d] = head[d] * inverse * float(weight[d]);
}

template <typename T, typename W, int M, int DIM, int BETWEEN, int OUTPUTS, int SIMDGROUPS>
METAL_FUNC void qkv_rope_append_impl(W wq, W wk, W wv, device const T* x, device const float* inv_freq,
                                     device const T* bias, device const T* norms, int position, int slot,
                                     device T* q, device T* keys, device T* values, int K, int heads, int kv_heads,
                                     int capacity, float eps, threadgroup float* rows, uint head, uint simdgroup,
                                     uint lane) {
  const bool is_q = int(head) < heads, is_k = !is_q && int(head) < heads + kv_heads;
  const int own = is_q ? int(head) : (int(head) - heads) % kv_heads;
  W w = wv;
  if (is_q) w = wq;
  if (is_k) w = wk;
  const int N = (is_q ? heads : kv_heads) * DIM;
  for (int block = int(simdgroup); block < DIM / OUTPUTS; block += SIMDGROUPS) {
    float sums[OUTPUTS][M];
    row_dots<T, W, M, OUTPUTS>(w, x, own * DIM + block * OUTPUTS, N, K, lane, sums);
    for (int r = 0; r < OUTPUTS; r++) {
      const int d = block * OUTPUTS + r;
      float value = own_sum<M>(sums[r], lane);
      if (BETWEEN == BIAS) value = value + float(bias[int(head) * DIM + d]);
      if (lane < uint(M)) rows[lane * DIM + d] = value;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int m = int(simdgroup); m < M; m += SIMDGROUPS) {
    threadgroup float* row = rows + m * DIM;
    if (is_q || is_k) {
      if (BETWEEN == QK_NORM) {
        norm_head<DIM, T>(row, norms + (is_q ? 0 : DIM), eps, lane);
        simdgroup_barrier(mem_flags::mem_threadgroup);
      }
      rope_head<DIM>(row, inv_freq, float(position + m), lane);
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
    device T* out = q + (size_t(m) * heads + own) * DIM;
    if (!is_q) out = (is_k ? keys : values) + (size_t(own) * capacity + slot + m) * DIM;
    for (int d = int(lane); d < DIM; d += 32) out[d] = T(row[d]);
  }
}

#ifndef SPECFAST_NO_ENTRY
template <typename T, typename W, int M, int DIM, int BETWEEN, int OUTPUTS, int SIMDGROUPS>
[[kernel]] void qkv_rope_append(
    device const uint* q_weight [[buffer(0)]], device const T* q_scales [[buffer(1)]],
    device const T* q_biases [[buffer(2)]], device const uint* k_weight [[buffer(3)]],
    device const T* k_scales [[buffer(4)]], device const T* k_biases [[buffer(5)]],
    device const uint* v_weight [[buffer(6)]], device const T* v_scales [[buffer(7)]],
    device const T* v_biases [[buffer(8)]], device const T* x [[buffer(9)]],
    device const float* inv_freq [[buffer(10)]], device const T* bias [[buffer(11)]],
    device const T* norms [[buffer(12)]], device const int* state [[buffer(13)]], device T* q [[buffer(14)]],
    device T* keys [[buffer(15)]], device T* values [[buffer(16)]], constant int* dims [[buffer(17)]],
    uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float rows[M * DIM];
  W wq, wk, wv;
  point_at(wq, q_weight, q_scales, q_biases);
  point_at(wk, k_weight, k_scales, k_biases);
  point_at(wv, v_weight, v_scales, v_biases);
  qkv_rope_append_impl<T, W, M, DIM, BETWEEN, OUTPUTS, SIMDGROUPS>(
      wq, wk, wv, x, inv_freq, bias, norms, state[0] + dims[4], state[1] + dims[4], q, keys, values, dims[0], dims[1],
      dims[2], dims[3], as_type<float>(dims[5]), rows, group.x, simdgroup, lane);
}
#endif
