// The int8 panel, defined plainly: exact integer dots per block, then two fused multiply-adds in block order.
#pragma once

namespace {

inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

void quantise_int8(const Rows& rows, Int8Layout layout, int k0, int k1) {
  const int block = block_of(layout);
  const Int8Rows& out = rows.int8[layout];
  for (int m = 0; m < rows.M; m++) {
    for (int k = k0; k < k1; k += block) {
      const float* x = rows.f32 + static_cast<size_t>(m) * rows.stride + k;
      const size_t at = static_cast<size_t>(k / block) * rows.M + m;
      int8_t* q = out.q + at * block;
      float top = 0;
      bool nan = false;
      for (int i = 0; i < block; i++) {
        const float a = __builtin_fabsf(x[i]);
        nan |= a != a;
        if (a > top) top = a;
      }
      const float inv = top > 0 ? 127.0f / top : 0.0f;
      int32_t total = 0;
      for (int i = 0; i < block; i++) {
        const float scaled = nan ? 0.0f : __builtin_rintf(x[i] * inv);
        const int8_t value = scaled >= -128.0f && scaled <= 127.0f ? static_cast<int8_t>(scaled) : int8_t{-128};
        q[interleaved(layout) ? (i % 2) * (block / 2) + i / 2 : i] = value;
        total += value;
      }
      out.scale[at] = nan ? __builtin_nanf("") : top * (1.0f / 127.0f);
      out.scaled_sum[at] = out.scale[at] * static_cast<float>(total);
      out.sum[at] = total;
    }
  }
}

void transpose_scales(const Matrix& w, const void* scales, int n, float* out) {
  const size_t groups = w.groups();
  for (int r = 0; r < kPanel; r++) {
    const size_t row = static_cast<size_t>(smaller(n + r, w.N - 1));
    for (size_t g = 0; g < groups; g++) out[g * kPanel + static_cast<size_t>(r)] = scale_at(scales, w.scale_format, row * groups + g);
  }
}

void int8_panel(const Matrix& w, const Rows& x, int n, const float* scales, const float* biases, float* tile) {
  const Int8Layout layout = int8_layout(w.format, w.group);
  const Int8Rows& in = x.int8[layout];
  const int block = block_of(layout), blocks = w.K / block, group_blocks = w.group / block;
  for (int r = 0; r < kPanel; r++) {
    const uint8_t* row = panel_row(w, n, r);
    for (int m = 0; m < x.M; m++) {
      float acc = 0;
      for (int b = 0; b < blocks; b++) {
        const size_t at = static_cast<size_t>(b) * x.M + m;
        const int8_t* q = in.q + at * block;
        int32_t dot = 0;
        if (w.format == Format::q4) {
          const uint8_t* packed = row + b * block / 2;
          for (int i = 0; i < block / 2; i++) dot += (packed[i] & 15) * q[i] + (packed[i] >> 4) * q[block / 2 + i];
        } else {
          const uint8_t* packed = row + b * block;
          for (int i = 0; i < block; i++) dot += packed[i] * q[i];
        }
        const float s = scales[(b / group_blocks) * kPanel + r], bias = biases[(b / group_blocks) * kPanel + r];
        acc = fused(bias, in.scaled_sum[at], acc);
        acc = fused(static_cast<float>(dot), s * in.scale[at], acc);
      }
      tile[m * kPanel + r] = acc;
    }
  }
}

}  // namespace
