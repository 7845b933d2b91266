// The int8 panel, defined plainly: exact integer dots per block, then two fused multiply-adds in block order.
#pragma once

namespace {

inline float fused(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
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
