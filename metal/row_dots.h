// Dot products of M rows with R weight rows, by one simdgroup: every weight is read once, whatever M is.
//
// Lane l takes inputs [32 S i + S l, 32 S i + S l + S), S the `step` of the weights, and adds its products in order of
// k, one fused multiply-add each; then simd_sum adds the lanes. This order is the same for every M, so a row's sum has
// the same bits beside any rows.
#pragma once
#include <metal_stdlib>
using namespace metal;
#pragma METAL fp contract(off)
#pragma METAL fp math_mode(safe)

/// MLX's affine layout: w = scale * q + bias; (N, K) packed in words, lowest bits first, scales and biases (N, K /
/// GROUP). K is a multiple of 32, rows are 16-byte aligned.
template <typename T, int BITS, int GROUP>
struct Affine {
  static constant constexpr const int step = 32;
  device const uint* weight;
  device const T* scales;
  device const T* biases;
};

/// (N, K) floats; K is a multiple of 8, rows are aligned to 4 elements.
template <typename T>
struct Dense {
  static constant constexpr const int step = 8;
  device const T* weight;
};

template <typename T, int BITS, int GROUP>
METAL_FUNC void point_at(thread Affine<T, BITS, GROUP>& w, device const uint* weight, device const T* scales,
                         device const T* biases) {
  w.weight = weight;
  w.scales = scales;
  w.biases = biases;
}
template <typename T>
METAL_FUNC void point_at(thread Dense<T>& w, device const uint* weight, device const T*, device const T*) {
  w.weight = (device const T*)weight;
}

/// What a lane holds of one weight row in one step.
template <typename W>
struct Step;
template <typename T, int BITS, int GROUP>
struct Step<Affine<T, BITS, GROUP>> {
  uint4 words[BITS / 4];
  float scale, bias;
};
template <typename T>
struct Step<Dense<T>> {
  vec<T, 4> values[2];
};

template <typename T, int BITS, int GROUP>
METAL_FUNC void load_step(Affine<T, BITS, GROUP> w, int row, int k, int K,
                          thread Step<Affine<T, BITS, GROUP>>& step) {
  const size_t group = (size_t(row) * K + k) / GROUP;
  device const uint4* words = (device const uint4*)(w.weight + (size_t(row) * K + k) / (32 / BITS));
  for (int i = 0; i < BITS / 4; i++) step.words[i] = words[i];
  step.scale = float(w.scales[group]);
  step.bias = float(w.biases[group]);
}
template <typename T>
METAL_FUNC void load_step(Dense<T> w, int row, int k, int K, thread Step<Dense<T>>& step) {
  device const vec<T, 4>* values = (device const vec<T, 4>*)(w.weight + size_t(row) * K + k);
  step.values[0] = values[0];
  step.values[1] = values[1];
}

/// The weights of inputs 8 `part`.. of a step.
template <typename T, int GROUP>
METAL_FUNC void weights_of(thread const Step<Affine<T, 4, GROUP>>& step, int part, thread float4& low,
                           thread float4& high) {
  const uint q = step.words[0][part];
  const float4 a = float4(float(q & 15), float((q >> 4) & 15), float((q >> 8) & 15), float((q >> 12) & 15));
  const float4 b = float4(float((q >> 16) & 15), float((q >> 20) & 15), float((q >> 24) & 15), float(q >> 28));
  low = fma(float4(step.scale), a, float4(step.bias));
  high = fma(float4(step.scale), b, float4(step.bias));
}
template <typename T, int GROUP>
METAL_FUNC void weights_of(thread const Step<Affine<T, 8, GROUP>>& step, int part, thread float4& low,
                           thread float4& high) {
  const uint q = step.words[part / 2][part % 2 * 2], r = step.words[part / 2][part % 2 * 2 + 1];
  const float4 a = float4(float(q & 255), float((q >> 8) & 255), float((q >> 16) & 255), float(q >> 24));
  const float4 b = float4(float(r & 255), float((r >> 8) & 255), float((r >> 16) & 255), float(r >> 24));
  low = fma(float4(step.scale), a, float4(step.bias));
  high = fma(float4(step.scale), b, float4(step.bias));
}
template <typename T>
METAL_FUNC void weights_of(thread const Step<Dense<T>>& step, int, thread float4& low, thread float4& high) {
  low = float4(step.values[0]);
  high = float4(step.values[1]);
}

METAL_FUNC float dot_8(float4 low, float4 high, float4 a, float4 b, float sum) {
  for (int i = 0; i < 4; i++) sum = fma(low[i], a[i], sum);
  for (int i = 0; i < 4; i++) sum = fma(high[i], b[i], sum);
  return sum;
}

/// sums[r][m] = the dot of weight row first + r and row m of x (M, K); in every lane. Rows from N on give 0.
template <typename T, typename W, int M, int R>
METAL_FUNC void row_dots(W w, device const T* x, int first, int N, int K, uint lane, thread float (&sums)[R][M]) {
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[r][m] = 0.0f;
  for (int k = int(lane) * W::step; k < K; k += 32 * W::step) {
    Step<W> steps[R];
    for (int r = 0; r < R; r++)
      if (first + r < N) load_step(w, first + r, k, K, steps[r]);
    for (int part = 0; part < W::step / 8; part++) {
      float4 low[R], high[R];
      for (int r = 0; r < R; r++)
        if (first + r < N) weights_of(steps[r], part, low[r], high[r]);
      for (int m = 0; m < M; m++) {
        device const vec<T, 4>* in = (device const vec<T, 4>*)(x + size_t(m) * K + k + 8 * part);
        const float4 a = float4(in[0]), b = float4(in[1]);
        for (int r = 0; r < R; r++)
          if (first + r < N) sums[r][m] = dot_8(low[r], high[r], a, b, sums[r][m]);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[r][m] = simd_sum(sums[r][m]);
}

/// The sum that lane m < M stores: of row m.
template <int M>
METAL_FUNC float own_sum(thread const float (&sums)[M], uint lane) {
  float own = sums[0];
  for (int m = 1; m < M; m++) own = lane == uint(m) ? sums[m] : own;
  return own;
}

METAL_FUNC float silu(float x) {
  return x / (1.0f + precise::exp(-x));
}
