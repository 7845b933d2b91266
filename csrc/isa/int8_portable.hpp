// Int8 rows and transposed scales without vector code: the definition, and what small instruction sets use.
#pragma once

namespace {

void quantise_int8(const Rows& rows, Int8Layout layout, int k0, int k1) {
  const int block = block_of(layout);
  quantise_blocks(rows, layout, k0, k1, [=](const float* x, int8_t* q) -> QuantisedBlock {
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
    return {top, nan, total};
  });
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
