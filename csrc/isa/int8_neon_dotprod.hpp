// The int8 panel on NEON dotprod: rows transposed four by four words in registers, lanes are outputs.
#pragma once

namespace {

/// w[j] becomes word j of four rows.
inline void transpose_quad(const uint8_t* const* rows, size_t offset, int8x16_t* w) {
  const uint32x4_t r0 = vreinterpretq_u32_u8(vld1q_u8(rows[0] + offset)),
                   r1 = vreinterpretq_u32_u8(vld1q_u8(rows[1] + offset));
  const uint32x4_t r2 = vreinterpretq_u32_u8(vld1q_u8(rows[2] + offset)),
                   r3 = vreinterpretq_u32_u8(vld1q_u8(rows[3] + offset));
  const uint64x2_t a = vreinterpretq_u64_u32(vtrn1q_u32(r0, r1)), b = vreinterpretq_u64_u32(vtrn2q_u32(r0, r1));
  const uint64x2_t c = vreinterpretq_u64_u32(vtrn1q_u32(r2, r3)), d = vreinterpretq_u64_u32(vtrn2q_u32(r2, r3));
  w[0] = vreinterpretq_s8_u64(vtrn1q_u64(a, c));
  w[1] = vreinterpretq_s8_u64(vtrn1q_u64(b, d));
  w[2] = vreinterpretq_s8_u64(vtrn2q_u64(a, c));
  w[3] = vreinterpretq_s8_u64(vtrn2q_u64(b, d));
}

/// Adds words 0..3 of four rows times 16 inputs.
inline int32x4_t dot_quad(int32x4_t acc, const int8x16_t* w, int8x16_t x) {
  acc = vdotq_laneq_s32(acc, w[0], x, 0);
  acc = vdotq_laneq_s32(acc, w[1], x, 1);
  acc = vdotq_laneq_s32(acc, w[2], x, 2);
  return vdotq_laneq_s32(acc, w[3], x, 3);
}

/// 4 R outputs, MT rows. 8-bit weights are made signed by subtracting 128, which the integer sum of the inputs gives
/// back exactly.
template <int BITS, int BLOCK, int R, int MT>
void int8_block(const Matrix& w, const uint8_t* const* rows, const Int8Rows& x, int M, int m0, const float* scales,
                const float* biases, float* tile) {
  constexpr int kBlockBytes = BLOCK * BITS / 8;
  const int blocks = w.K / BLOCK, group_blocks = w.group / BLOCK;
  float32x4_t acc[R][MT];
  SPECFAST_UNROLL
  for (int r = 0; r < R; r++) {
    SPECFAST_UNROLL
    for (int m = 0; m < MT; m++) acc[r][m] = zero();
  }
  for (int b = 0; b < blocks; b++) {
    const size_t at = static_cast<size_t>(b) * M + m0;
    const int8_t* q = x.q + at * BLOCK;
    int32x4_t t[R][MT];
    SPECFAST_UNROLL
    for (int r = 0; r < R; r++) {
      SPECFAST_UNROLL
      for (int m = 0; m < MT; m++) t[r][m] = vdupq_n_s32(BITS == 8 ? 128 * x.sum[at + m] : 0);
    }
    for (int i = 0; i < kBlockBytes; i += 16) {
      SPECFAST_UNROLL
      for (int r = 0; r < R; r++) {
        int8x16_t word[4], high[4];
        transpose_quad(rows + 4 * r, static_cast<size_t>(b) * kBlockBytes + i, word);
        SPECFAST_UNROLL
        for (int j = 0; j < 4; j++) {
          if constexpr (BITS == 4) {
            high[j] = vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(word[j]), 4));
            word[j] = vandq_s8(word[j], vdupq_n_s8(15));
          } else {
            word[j] = veorq_s8(word[j], vdupq_n_s8(-128));
          }
        }
        SPECFAST_UNROLL
        for (int m = 0; m < MT; m++) {
          t[r][m] = dot_quad(t[r][m], word, vld1q_s8(q + m * BLOCK + i));
          if constexpr (BITS == 4) t[r][m] = dot_quad(t[r][m], high, vld1q_s8(q + m * BLOCK + BLOCK / 2 + i));
        }
      }
    }
    SPECFAST_UNROLL
    for (int r = 0; r < R; r++) {
      const float32x4_t s = load(scales + static_cast<size_t>(b / group_blocks) * kPanel + 4 * r);
      const float32x4_t bias = load(biases + static_cast<size_t>(b / group_blocks) * kPanel + 4 * r);
      SPECFAST_UNROLL
      for (int m = 0; m < MT; m++) {
        acc[r][m] = vfmaq_f32(acc[r][m], bias, vdupq_n_f32(x.scaled_sum[at + m]));
        acc[r][m] = vfmaq_f32(acc[r][m], vcvtq_f32_s32(t[r][m]), vmulq_f32(s, vdupq_n_f32(x.scale[at + m])));
      }
    }
  }
  SPECFAST_UNROLL
  for (int r = 0; r < R; r++) {
    SPECFAST_UNROLL
    for (int m = 0; m < MT; m++) store(tile + (m0 + m) * kPanel + 4 * r, acc[r][m]);
  }
}

/// 8 outputs, MT rows: the sums of up to 4 rows fit the registers for all outputs, those of more rows for half of them.
template <int BITS, int BLOCK, int MT>
void int8_rows(const Matrix& w, const uint8_t* const* rows, const Int8Rows& x, int M, int m0, const float* scales,
               const float* biases, float* tile) {
  constexpr int R = MT <= 4 ? 2 : 1;
  for (int r = 0; r < 8; r += 4 * R)
    int8_block<BITS, BLOCK, R, MT>(w, rows + r, x, M, m0, scales + r, biases + r, tile + r);
}

/// The instruction of the dots, for the measurement of its peak.
constexpr int kDotProducts = 16;
inline void dot_once(int32x4_t& acc, int8x16_t a) {
  __asm__ volatile("sdot %0.4s, %1.16b, %1.16b" : "+w"(acc) : "w"(a));
}

}  // namespace
