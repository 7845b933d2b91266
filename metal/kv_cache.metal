// The cache's transaction on the device: a verdict becomes lengths and the tokens of the next round, with no host.
//
// commit_round: one thread. The verified tokens are tokens[0..]: the last committed token, the pending one, the drafted
// ones; verdict[0] of the drafted are kept and verdict[1] is pending next. state[0] and state[1], the position and slot
// of the pending token, move over what is kept; what lies behind them in the cache is dropped by that alone. text gets
// the new tokens from text[state[2]] on, and state[2] counts them. A verdict of -1 keeps nothing and sets state[3].
// compact_path: grid (count, 2 kv_heads, 1), 32 threads: moves the rows of an accepted path of a tree draft, slots
// state[1] + path[i] with path ascending, to state[1] + i, through `scratch` (count, 2 kv_heads, DIM).
#include <metal_stdlib>
using namespace metal;

METAL_FUNC void commit_round_impl(device const int* verdict, device int* tokens, device int* state,
                                  device int* text) {
  const int kept = verdict[0], next = verdict[1];
  if (next < 0) {
    state[3] = 1;
    return;
  }
  const int count = state[2];
  for (int i = 0; i < kept; i++) text[count + i] = tokens[2 + i];
  text[count + kept] = next;
  tokens[0] = kept > 0 ? tokens[1 + kept] : tokens[1];
  tokens[1] = next;
  state[0] = state[0] + kept + 1;
  state[1] = state[1] + kept + 1;
  state[2] = count + kept + 1;
}

/// Copies rows out (to_cache false) or back in.
template <typename T, int DIM>
METAL_FUNC void compact_path_impl(device T* keys, device T* values, device const int* path, device const int* state,
                                  device T* scratch, int kv_heads, int capacity, bool to_cache, uint2 group,
                                  uint lane) {
  const int head = int(group.y) % kv_heads, slot = state[1] + (to_cache ? int(group.x) : path[group.x]);
  device T* row = (int(group.y) < kv_heads ? keys : values) + (size_t(head) * capacity + slot) * DIM;
  device T* held = scratch + (size_t(group.x) * 2 * kv_heads + group.y) * DIM;
  for (int d = int(lane); d < DIM; d += 32) {
    if (to_cache) row[d] = held[d];
    if (!to_cache) held[d] = row[d];
  }
}

#ifndef SPECFAST_NO_ENTRY
[[kernel]] void commit_round(device const int* verdict [[buffer(0)]], device int* tokens [[buffer(1)]],
                             device int* state [[buffer(2)]], device int* text [[buffer(3)]],
                             uint index [[thread_index_in_threadgroup]]) {
  if (index == 0) commit_round_impl(verdict, tokens, state, text);
}

template <typename T, int DIM, int TO_CACHE>
[[kernel]] void compact_path(device const int* path [[buffer(0)]], device const int* state [[buffer(1)]],
                             device T* scratch [[buffer(2)]], device T* keys [[buffer(3)]],
                             device T* values [[buffer(4)]], constant int* dims [[buffer(5)]],
                             uint3 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  compact_path_impl<T, DIM>(keys, values, path, state, scratch, dims[0], dims[1], TO_CACHE != 0, group.xy, lane);
}
#endif
