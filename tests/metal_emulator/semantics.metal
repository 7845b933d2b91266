// What the shim promises, written so that NumPy can say what must come out. One simdgroup each unless said otherwise.
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

// y (12, 32): the collectives of x (32,)
kernel void collectives(device const float* x [[buffer(0)]], device float* y [[buffer(1)]], uint lane [[thread_index_in_simdgroup]]) {
  const float v = x[lane];
  y[0 * 32 + lane] = simd_sum(v);
  y[1 * 32 + lane] = simd_max(v);
  y[2 * 32 + lane] = simd_min(v);
  y[3 * 32 + lane] = simd_shuffle(v, ushort(31 - lane));
  y[4 * 32 + lane] = simd_shuffle_xor(v, ushort(5));
  y[5 * 32 + lane] = simd_shuffle_down(v, ushort(3));
  y[6 * 32 + lane] = simd_shuffle_up(v, ushort(3));
  y[7 * 32 + lane] = simd_broadcast(v, ushort(7));
  y[8 * 32 + lane] = simd_prefix_inclusive_sum(v);
  y[9 * 32 + lane] = simd_prefix_exclusive_sum(v);
  y[10 * 32 + lane] = float(ulong(simd_ballot(v > 0.0f)) & 0xffffu);
  y[11 * 32 + lane] = quad_sum(v);
}

// y = a b + c in 8x8 simdgroup matrices; b is given transposed
kernel void matrices(device const half* a [[buffer(0)]], device const half* b [[buffer(1)]], device const float* c [[buffer(2)]],
                     device float* y [[buffer(3)]]) {
  simdgroup_matrix<half, 8, 8> left, right;
  simdgroup_matrix<float, 8, 8> sum;
  simdgroup_load(left, a, 8);
  simdgroup_load(right, b, 8, ulong2(0, 0), true);
  simdgroup_load(sum, c, 8);
  simdgroup_multiply_accumulate(sum, left, right, sum);
  simdgroup_store(sum, y, 8);
}

// 16-bit floats round after every operation; h (4, 32), b (4, 32)
kernel void rounding(device const half* x [[buffer(0)]], device half* h [[buffer(1)]], device bfloat* b [[buffer(2)]],
                     uint i [[thread_index_in_threadgroup]]) {
  const half u = x[i];
  const bfloat v = bfloat(float(u));
  h[i] = u + u * u;
  h[32 + i] = half(float(u) / 3.0f);
  h[64 + i] = -u;
  h[96 + i] = max(u, half(0.25f));
  b[i] = v + v * v;
  b[32 + i] = bfloat(float(v) / 3.0f);
  b[64 + i] = -v;
  b[96 + i] = max(v, bfloat(0.25f));
}

// y (2, 3) x 64 threads over a grid: where each thread is; threadgroups of (8, 4, 2)
kernel void positions(device uint* y [[buffer(0)]], uint3 at [[thread_position_in_grid]], uint3 size [[threads_per_grid]],
                      uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
                      uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
  device uint* mine = y + 6 * ((at.z * size.y + at.y) * size.x + at.x);
  mine[0] = group.x;
  mine[1] = group.y;
  mine[2] = group.z;
  mine[3] = index;
  mine[4] = simdgroup;
  mine[5] = simdgroups;
}

// y (8, 32): vectors, swizzles, bits
kernel void vectors(device const uint* x [[buffer(0)]], device float* y [[buffer(1)]], uint i [[thread_index_in_threadgroup]]) {
  const uint4 v = uint4(x[i], x[i] >> 8, x[i] >> 16, x[i] >> 24) & 255u;
  const float4 f = float4(v) * 0.5f + float4(1.0f);
  y[i] = dot(f.xy, f.zw);
  y[32 + i] = f.wzyx.x + f.yzw.y;
  y[64 + i] = select(f, float4(v), v > uint4(100u)).z;
  y[96 + i] = any(v == uint4(255u)) ? 1.0f : 0.0f;
  y[128 + i] = float(popcount(x[i]) + clz(x[i]) + ctz(x[i]));
  y[160 + i] = as_type<float>((x[i] & 0x007fffffu) | 0x3f800000u);
  y[192 + i] = float(extract_bits(x[i], 5u, 7u));
  y[224 + i] = float(mulhi(x[i], 0x9E3779B9u) >> 16);
}

// Counting, two simdgroups: read once by each lane (the second time it is in a register), once by a whole simdgroup, twice
// with a loop between, and by both simdgroups.
kernel void reads(device const float* once [[buffer(0)]], device const float* shared [[buffer(1)]], device const float* twice [[buffer(2)]],
                  device const uchar* packed [[buffer(3)]], device float* y [[buffer(4)]], uint i [[thread_index_in_threadgroup]],
                  uint lane [[thread_index_in_simdgroup]]) {
  y[i] = once[i] + shared[0];
  float sum = once[i];
  for (uint pass = 0; pass < 2; pass++) {
    sum += twice[i];
    for (uint k = 0; k < 8; k++) sum += twice[(i + k + 1) % 64];
    sum = simd_sum(sum);
  }
  y[i] += sum + float(packed[i / 8]) + twice[64 + lane];
}
