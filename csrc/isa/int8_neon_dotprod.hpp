// Integer dots of a block on NEON dotprod: rows transposed four by four words in registers, lanes are outputs.
#pragma once

namespace {

/// Adds words 0..3 of four rows times 16 inputs.
inline int32x4_t dot_quad(int32x4_t acc, const int8x16_t* w, int8x16_t x) {
  acc = vdotq_laneq_s32(acc, w[0], x, 0);
  acc = vdotq_laneq_s32(acc, w[1], x, 1);
  acc = vdotq_laneq_s32(acc, w[2], x, 2);
  return vdotq_laneq_s32(acc, w[3], x, 3);
}

/// dots[r][m] becomes the dots of weight rows 4r.. with row m of a block whose first row lies at `q`. 8-bit weights are
/// made signed by subtracting 128, which the integer sum of the inputs gives back exactly.
template <int BITS, int BLOCK, int R, int MT>
inline void block_dots(const uint8_t* const* rows, size_t offset, const int8_t* q, const int32_t* sum,
                       int32x4_t (*dots)[MT]) {
  SPECFAST_UNROLL
  for (int r = 0; r < R; r++) {
    SPECFAST_UNROLL
    for (int m = 0; m < MT; m++) dots[r][m] = BITS == 8 ? vshlq_n_s32(vld1q_dup_s32(sum + m), 7) : vdupq_n_s32(0);
  }
  for (int i = 0; i < BLOCK * BITS / 8; i += 16) {
    SPECFAST_UNROLL
    for (int r = 0; r < R; r++) {
      uint32x4_t words[4];
      int8x16_t low[4], high[4];
      transpose_quad(rows + 4 * r, offset + static_cast<size_t>(i), words);
      SPECFAST_UNROLL
      for (int j = 0; j < 4; j++) {
        const uint8x16_t word = vreinterpretq_u8_u32(words[j]);
        low[j] = vreinterpretq_s8_u8(BITS == 4 ? vandq_u8(word, vdupq_n_u8(15)) : veorq_u8(word, vdupq_n_u8(128)));
        if constexpr (BITS == 4) high[j] = vreinterpretq_s8_u8(vshrq_n_u8(word, 4));
      }
      SPECFAST_UNROLL
      for (int m = 0; m < MT; m++) {
        dots[r][m] = dot_quad(dots[r][m], low, vld1q_s8(q + m * BLOCK + i));
        if constexpr (BITS == 4) dots[r][m] = dot_quad(dots[r][m], high, vld1q_s8(q + m * BLOCK + BLOCK / 2 + i));
      }
    }
  }
}

/// The instruction of the dots, for the measurement of its peak.
constexpr int kDotProducts = 16;
inline void dot_once(int32x4_t& acc, int8x16_t a) {
  __asm__ volatile("sdot %0.4s, %1.16b, %1.16b" : "+w"(acc) : "w"(a));
}

}  // namespace
