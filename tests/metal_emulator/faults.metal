// One fault per kernel, and the right form beside some: what the emulator must report. Each takes one threadgroup of 64
// threads unless its comment says otherwise.
#include <metal_stdlib>
using namespace metal;

kernel void reversed(device float* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup float shared[64];
  shared[i] = y[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = shared[63 - i];
}
kernel void reversed_without_barrier(device float* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup float shared[64];
  shared[i] = y[i];
  y[i] = shared[63 - i];  // FAULT reversed_without_barrier
}
kernel void reversed_with_empty_barrier(device float* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup float shared[64];
  shared[i] = y[i];
  threadgroup_barrier(mem_flags::mem_none);
  y[i] = shared[63 - i];  // FAULT reversed_with_empty_barrier
}
// Four threadgroups.
kernel void total(device atomic_uint* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  atomic_fetch_add_explicit(y, i, memory_order_relaxed);
}
kernel void race_across_threadgroups(device uint* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  if (i == 0) y[0] += 1;  // FAULT race_across_threadgroups
}
kernel void beyond_a_buffer(device float* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  y[i] = y[i + 1];  // FAULT beyond_a_buffer
}
kernel void beyond_threadgroup_memory(device float* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup float shared[64];
  shared[i + 1] = y[i];  // FAULT beyond_threadgroup_memory
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = shared[i];
}
kernel void beyond_registers(device float* y [[buffer(0)]], device const int* n [[buffer(1)]], uint i [[thread_index_in_threadgroup]]) {
  float values[4] = {0.0f};
  for (int k = 0; k < n[0]; k++) values[k] += y[i];  // FAULT beyond_registers
  y[i] = values[0] + values[3];
}
kernel void unset_threadgroup_memory(device float* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup float shared[64];
  if (i < 63) shared[i] = y[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = shared[i] > 0.0f ? 1.0f : 2.0f;  // FAULT unset_threadgroup_memory
}
kernel void copied_unset_threadgroup_memory(device float* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup float shared[64];
  if (i < 63) shared[i] = y[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = shared[i];
}
kernel void divergent_reduction(device float* y [[buffer(0)]], uint lane [[thread_index_in_simdgroup]], uint i [[thread_index_in_threadgroup]]) {
  float value = y[i];
  if (lane < 16)
    value = simd_sum(value);  // FAULT divergent_reduction
  else
    value = simd_max(value);
  y[i] = value;
}
kernel void part_of_a_simdgroup(device float* y [[buffer(0)]], uint lane [[thread_index_in_simdgroup]], uint i [[thread_index_in_threadgroup]]) {
  if (lane >= 16) return;
  y[i] = simd_sum(y[i]);  // FAULT part_of_a_simdgroup
}
kernel void barrier_in_a_branch(device float* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  if (i < 32) threadgroup_barrier(mem_flags::mem_threadgroup);  // FAULT barrier_in_a_branch
  y[i] = 1.0f;
}
kernel void misaligned(device uint* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  device const uint4* four = (device const uint4*)(y + 1);
  if (i == 0) y[0] = four[0].w;  // FAULT misaligned
}
kernel void too_much_threadgroup_memory(device uint* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup uint a[5000];
  threadgroup uint b[4000];
  a[i] = y[i];
  b[i] = a[i];
  y[i] = b[i];
}
