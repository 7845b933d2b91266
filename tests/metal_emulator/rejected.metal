// One mistake per marked line: what an Apple compiler rejects, or a habit that means something else there.
#include <metal_stdlib>
using namespace metal;

static const float table[2] = {1.0f, 2.0f};  // REJECTED constant address space
constexpr int width = 32;  // REJECTED constant address space
constant float allowed[2] = {1.0f, 2.0f};

float first(float* p) { return p[0]; }
template <typename T> T second(device const T* p) { return p[1]; }

void not_a_kernel() {
  threadgroup float shared[32];  // REJECTED belong into kernels
}

kernel void mixes_spaces(device float* x [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup float shared[32];
  device float* p = shared;  // REJECTED cannot initialize
  const float* q = x;  // REJECTED cannot initialize
  shared[i] = first(x);  // REJECTED no matching function
  x[i] = second(x) + p[0] + q[0] + allowed[0];
}
kernel void writes_a_constant(constant float& scale [[buffer(0)]], device float* x [[buffer(1)]], uint i [[thread_index_in_threadgroup]]) {
  scale = 1.0f;  // REJECTED const-qualified
  x[i] = scale;
}
kernel void wide_collective(device const ulong* x [[buffer(0)]], device ulong* y [[buffer(1)]], uint i [[thread_index_in_threadgroup]]) {
  y[i] = simd_sum(x[i]);  // REJECTED simd_sum takes numbers of 32 or 16 bits
}
kernel void ambiguous(device float* x [[buffer(0)]], device half* h [[buffer(1)]], uint i [[thread_index_in_threadgroup]]) {
  x[i] = max(x[i], 0);  // REJECTED no matching function
  x[i] = clamp(x[i], 0.0f, h[i]);  // REJECTED no matching function
  x[i] = min(int(i), i);  // REJECTED no matching function
}
kernel void literals(device float* x [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  x[i] = x[i] * 0.5;  // REJECTED write the f
  double wide = x[i];  // REJECTED Metal has no double
  x[i] = float(wide);
  long long n = 3;  // REJECTED Metal has no long long
  x[i] += float(n);
  auto twice = [](float v) { return v + v; };  // REJECTED no lambda
  x[i] = twice(x[i]);
}
kernel void vectors(device float4* x [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  x[i] = float4(1.0f, 2.0f, 3.0f);  // REJECTED wrong number of components
  float2 two = x[i].xy;
  x[i].xyz = two;  // REJECTED assigning to
  uint word = as_type<uint>(two);  // REJECTED as_type needs types of one size
  x[i].x = float(word);
}
kernel void positions(device float* x [[buffer(0)]], device float* y [[buffer(0)]], uint i [[thread_position_in_grid]],  // REJECTED given twice
                      uint3 group [[threadgroup_position_in_grid]], float lane [[thread_index_in_simdgroup]]) {  // REJECTED is a uint
  x[i] = y[group.x] + lane;  // REJECTED positions of different types
}
kernel void no_space(float* x [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) { x[i] = 0.0f; }  // REJECTED no address space
