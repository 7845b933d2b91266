// Int8 rows and transposed scales on NEON; the same bits as int8_portable.hpp.
#pragma once

namespace {

/// w[j] becomes word j of four rows, at `offset` bytes.
inline void transpose_quad(const uint8_t* const* rows, size_t offset, uint32x4_t* w) {
  uint32x4_t r[4];
  SPECFAST_UNROLL
  for (int i = 0; i < 4; i++) r[i] = vreinterpretq_u32_u8(vld1q_u8(rows[i] + offset));
  const uint64x2_t a = vreinterpretq_u64_u32(vtrn1q_u32(r[0], r[1])), b = vreinterpretq_u64_u32(vtrn2q_u32(r[0], r[1]));
  const uint64x2_t c = vreinterpretq_u64_u32(vtrn1q_u32(r[2], r[3])), d = vreinterpretq_u64_u32(vtrn2q_u32(r[2], r[3]));
  w[0] = vreinterpretq_u32_u64(vtrn1q_u64(a, c));
  w[1] = vreinterpretq_u32_u64(vtrn1q_u64(b, d));
  w[2] = vreinterpretq_u32_u64(vtrn2q_u64(a, c));
  w[3] = vreinterpretq_u32_u64(vtrn2q_u64(b, d));
}

/// Scales (or biases) of 16 rows from n on as floats (groups, 16).
void transpose_scales(const Matrix& w, const void* scales, int n, float* out) {
  const size_t groups = w.groups(), bytes = w.scale_bytes(), chunk = 16 / bytes;
  for (int quad = 0; quad < kPanel; quad += 4) {
    const uint8_t* rows[4];
    for (int i = 0; i < 4; i++)
      rows[i] =
          static_cast<const uint8_t*>(scales) + static_cast<size_t>(smaller(n + quad + i, w.N - 1)) * groups * bytes;
    size_t g = 0;
    for (; g + chunk <= groups; g += chunk) {
      uint32x4_t words[4];
      transpose_quad(rows, g * bytes, words);
      float* to = out + g * kPanel + quad;
      SPECFAST_UNROLL
      for (int j = 0; j < 4; j++) {
        if (w.scale_format == Format::f32) {
          store(to + j * kPanel, vreinterpretq_f32_u32(words[j]));
        } else if (w.scale_format == Format::bf16) {  // a word holds two neighbouring groups
          store(to + 2 * j * kPanel, vreinterpretq_f32_u32(vshlq_n_u32(words[j], 16)));
          store(to + (2 * j + 1) * kPanel, vreinterpretq_f32_u32(vandq_u32(words[j], vdupq_n_u32(0xffff0000u))));
        } else {
          store(to + 2 * j * kPanel, vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(words[j]))));
          store(to + (2 * j + 1) * kPanel, vcvt_f32_f16(vreinterpret_f16_u16(vshrn_n_u32(words[j], 16))));
        }
      }
    }
    for (; g < groups; g++) {
      for (int i = 0; i < 4; i++)
        out[g * kPanel + static_cast<size_t>(quad + i)] = scale_at(rows[i], w.scale_format, g);
    }
  }
}

/// Four inputs rounded to even integers within int8; -128 stands for what lies outside or is no number.
inline int32x4_t round_int8(Vec x, Vec inv) {
  const Vec rounded = vrndnq_f32(mul(x, inv));
  const uint32x4_t inside = vandq_u32(vcgeq_f32(rounded, broadcast(-128.0f)), vcleq_f32(rounded, broadcast(127.0f)));
  return vbslq_s32(inside, vcvtq_s32_f32(rounded), vdupq_n_s32(-128));
}

void quantise_int8(const Rows& rows, Int8Layout layout, int k0, int k1) {
  const int block = block_of(layout);
  quantise_blocks(rows, layout, k0, k1, [=](const float* x, int8_t* q) -> QuantisedBlock {
    Vec top = zero();
    uint32x4_t numbers = vdupq_n_u32(~0u);
    for (int i = 0; i < block; i += kLanes) {
      const Vec a = load(x + i);
      numbers = vandq_u32(numbers, vceqq_f32(a, a));
      top = max(vabsq_f32(a), top);
    }
    const bool is_nan = vminvq_u32(numbers) == 0;
    const float peak = maximum(top);
    const Vec inv = broadcast(peak > 0 ? 127.0f / peak : 0.0f);
    int32x4_t total = vdupq_n_s32(0);
    for (int i = 0; i < block; i += 32) {
      int8x16_t bytes[2];
      SPECFAST_UNROLL
      for (int half = 0; half < 2; half++) {
        int32x4_t v[4];
        SPECFAST_UNROLL
        for (int j = 0; j < 4; j++) {
          v[j] = is_nan ? vdupq_n_s32(0) : round_int8(load(x + i + 16 * half + 4 * j), inv);
          total = vaddq_s32(total, v[j]);
        }
        bytes[half] = vcombine_s8(vmovn_s16(vcombine_s16(vmovn_s32(v[0]), vmovn_s32(v[1]))),
                                  vmovn_s16(vcombine_s16(vmovn_s32(v[2]), vmovn_s32(v[3]))));
      }
      if (interleaved(layout)) {
        vst1q_s8(q + i / 2, vuzp1q_s8(bytes[0], bytes[1]));
        vst1q_s8(q + block / 2 + i / 2, vuzp2q_s8(bytes[0], bytes[1]));
      } else {
        vst1q_s8(q + i, bytes[0]);
        vst1q_s8(q + i + 16, bytes[1]);
      }
    }
    return {peak, is_nan, vaddvq_s32(total)};
  });
}

}  // namespace
