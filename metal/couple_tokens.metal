// The coupled rule on the device: every row's token is argmin(noise / weight), csrc/couple_tokens.hpp bit for bit.
//
// couple_rows: grid (ceil(V / 4096), rows, 1), 256 threads: the leader among 4096 ids; leaders (rows, ceil(V / 4096),
// 3): the ratio's words, low first, and the id. couple_pick: one threadgroup of 32: keeps drafted tokens while they are
// the rows' choices. weights (rows, V) float32: the laws, or their weights. state[0] is the position of the pending
// token; row i chooses the token of position state[0] + 1 + POSITION + i. settings as in verify_tokens.
#include "law.h"

enum Setting { GAMMA = 0, VOCAB = 1, SEED = 4, POSITION = 11, FIRST = 12, SLOT = 13, WITH_TAU = 14 };

struct Leader {
  ulong ratio;
  int id;
};
/// Whether b wins against a: a smaller ratio, or the lower id among equals.
METAL_FUNC bool wins(ulong ratio, int id, Leader a) {
  if (id < 0) return false;
  return a.id < 0 || b64_less(ratio, a.ratio) || (ratio == a.ratio && id < a.id);
}
METAL_FUNC Leader leader_of(Leader own) {
  for (ushort step = 16; step > 0; step /= 2) {
    const ulong ratio = simd_down(own.ratio, step);
    const int id = simd_shuffle_down(own.id, step);
    if (wins(ratio, id, own)) {
      own.ratio = ratio;
      own.id = id;
    }
  }
  return own;
}

METAL_FUNC void couple_rows_impl(device const float* weights, device const int* state, device const int* settings,
                                 device uint* leaders, threadgroup uint* shared, uint2 group, uint groups,
                                 uint simdgroup, uint lane) {
  const int V = settings[VOCAB];
  const ulong seed = (ulong(uint(settings[SEED + 1])) << 32) | uint(settings[SEED]);
  const ulong position = ulong(state[0] + 1 + settings[POSITION] + int(group.y));
  Leader own;
  own.ratio = 0;
  own.id = -1;
  float bound = INFINITY;  // a word / 2 above bound * weight cannot win
  for (int c = int(simdgroup * 32 + lane); c < 1024; c += 256) {
    const int first = int(group.x) * 4096 + c / 16 * 64 + c % 16;
    if (first >= V) break;
    const uint4 words = philox(noise_counter(uint(first), position, NOISE), seed);
    for (int w = 0; w < 4; w++) {
      const int id = first + 16 * w;
      const float weight = id < V ? weights[size_t(group.y) * V + id] : 0.0f;
      if (!(weight > 0.0f) || float(int(words[w] >> 1)) > bound * weight) continue;
      const ulong ratio = b64_divide(noise_from(words[w], seed, position, uint(id)), b64_of(weight));
      if (!wins(ratio, id, own)) continue;
      own.ratio = ratio;
      own.id = id;
      const ulong most = b64_multiply(b64_multiply(ratio, 0x41e0000000000000ul), 0x3ff0000100000000ul);
      bound = b64_less(most, 0x47d2ced32a16a1b1ul) ? as_type<float>(b64_float_bits(most)) : INFINITY;  // 1e38
    }
  }
  own = leader_of(own);
  if (lane == 0) {
    shared[simdgroup * 3] = uint(own.ratio);
    shared[simdgroup * 3 + 1] = uint(own.ratio >> 32);
    shared[simdgroup * 3 + 2] = uint(own.id);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup > 0 || lane > 0) return;
  for (int s = 1; s < 8; s++) {
    const ulong ratio = (ulong(shared[s * 3 + 1]) << 32) | shared[s * 3];
    if (!wins(ratio, int(shared[s * 3 + 2]), own)) continue;
    own.ratio = ratio;
    own.id = int(shared[s * 3 + 2]);
  }
  device uint* out = leaders + (size_t(group.y) * groups + group.x) * 3;
  out[0] = uint(own.ratio);
  out[1] = uint(own.ratio >> 32);
  out[2] = uint(own.id);
}

METAL_FUNC void couple_pick_impl(device const uint* leaders, device const int* tokens, device const int* settings,
                                 device int* out, uint lane) {
  const int groups = (settings[VOCAB] + 4095) / 4096;
  for (int row = 0;; row++) {
    Leader own;
    own.ratio = 0;
    own.id = -1;
    for (int g = int(lane); g < groups; g += 32) {
      device const uint* at = leaders + (row * groups + g) * 3;
      const ulong ratio = (ulong(at[1]) << 32) | at[0];
      if (!wins(ratio, int(at[2]), own)) continue;
      own.ratio = ratio;
      own.id = int(at[2]);
    }
    const int id = simd_broadcast_first(leader_of(own).id);
    if (row < settings[GAMMA] && id == tokens[settings[FIRST] + row]) continue;
    if (lane == 0) {
      if (settings[WITH_TAU] != 0) out[settings[SLOT] - 1] = row;
      out[settings[SLOT]] = id;
    }
    return;
  }
}

#ifndef SPECFAST_NO_ENTRY
[[kernel]] void couple_rows(device const float* weights [[buffer(0)]], device const int* state [[buffer(1)]],
                            device const int* settings [[buffer(2)]], device uint* leaders [[buffer(3)]],
                            uint3 group [[threadgroup_position_in_grid]], uint3 groups [[threadgroups_per_grid]],
                            uint simdgroup [[simdgroup_index_in_threadgroup]],
                            uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint shared[24];
  couple_rows_impl(weights, state, settings, leaders, shared, group.xy, groups.x, simdgroup, lane);
}

[[kernel]] void couple_pick(device const uint* leaders [[buffer(0)]], device const int* tokens [[buffer(1)]],
                            device const int* settings [[buffer(2)]], device int* out [[buffer(3)]],
                            uint lane [[thread_index_in_simdgroup]]) {
  couple_pick_impl(leaders, tokens, settings, out, lane);
}
#endif
