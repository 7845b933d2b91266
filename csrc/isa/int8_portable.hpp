// Int8 rows and transposed scales without vector code: the definition, and what small instruction sets use.
#pragma once

namespace {

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
    for (size_t g = 0; g < groups; g++)
      out[g * kPanel + static_cast<size_t>(r)] = scale_at(scales, w.scale_format, row * groups + g);
  }
}

}  // namespace
