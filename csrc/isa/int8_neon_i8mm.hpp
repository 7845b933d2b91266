// The int8 panel on NEON i8mm: products of two weight rows by two rows of activations, eight inputs at a time.
#pragma once

#if !defined(__ARM_FEATURE_MATMUL_INT8)
#error "compile with -march=armv8.2-a+dotprod+i8mm"
#endif

namespace {

/// Quantises, then lays rows m and m + 1 (m even) of a block side by side: eight inputs of one, the same eight of the
/// other. The last of an odd number of rows stays alone.
void quantise_pairs(const Rows& rows, Int8Layout layout, int k0, int k1) {
  quantise_int8(rows, layout, k0, k1);
  const size_t block = static_cast<size_t>(block_of(layout)), M = static_cast<size_t>(rows.M);
  for (size_t k = static_cast<size_t>(k0); k < static_cast<size_t>(k1); k += block) {
    for (size_t m = 0; m + 2 <= M; m += 2) {
      int8_t* q = rows.int8[layout].q + k * M + m * block;
      int8_t plain[128];
      std::memcpy(plain, q, 2 * block);
      for (size_t i = 0; i < block; i += 8) {
        std::memcpy(q + 2 * i, plain + i, 8);
        std::memcpy(q + 2 * i + 8, plain + block + i, 8);
      }
    }
  }
}

/// Multiplies eight inputs of four pairs of weight rows with those of MT rows: t[p][r] holds rows 2p and 2p + 1 of
/// weight row 2r, then of 2r + 1. `q` is the block of the first row, `eight` counts its eights.
template <int BLOCK, int MT>
inline void dot_eight(int32x4_t (*t)[4], const uint8x16_t* weights, const int8_t* q, int eight) {
  SPECFAST_UNROLL
  for (int p = 0; 2 * p < MT; p++) {
    const int8_t* pair = q + 2 * p * BLOCK;
    const int8x16_t x = 2 * p + 1 < MT ? vld1q_s8(pair + 16 * eight)
                                       : vcombine_s8(vld1_s8(pair + 8 * eight), vld1_s8(pair + 8 * eight));
    SPECFAST_UNROLL
    for (int r = 0; r < 4; r++) t[p][r] = vusmmlaq_s32(t[p][r], weights[r], x);
  }
}

/// 8 outputs, MT rows, of which each product takes two.
template <int BITS, int BLOCK, int MT>
void int8_rows(const Matrix& w, const uint8_t* const* rows, const Int8Rows& x, int M, int m0, const float* scales,
               const float* biases, float* tile) {
  constexpr int kBlockBytes = BLOCK * BITS / 8, kPairs = (MT + 1) / 2;
  const int blocks = w.K / BLOCK, group_blocks = w.group / BLOCK;
  float32x4_t acc[2][MT];
  SPECFAST_UNROLL
  for (int m = 0; m < MT; m++) acc[0][m] = acc[1][m] = zero();
  for (int b = 0; b < blocks; b++) {
    const size_t at = static_cast<size_t>(b) * M + m0;
    const int8_t* q = x.q + at * BLOCK;
    int32x4_t t[kPairs][4];
    SPECFAST_UNROLL
    for (int p = 0; p < kPairs; p++) {
      SPECFAST_UNROLL
      for (int r = 0; r < 4; r++) t[p][r] = vdupq_n_s32(0);
    }
    for (int i = 0; i < kBlockBytes; i += 16) {
      uint8x16_t bytes[2][4];  // the first and the last eight of two weight rows
      SPECFAST_UNROLL
      for (int r = 0; r < 4; r++) {
        const size_t offset = static_cast<size_t>(b) * kBlockBytes + i;
        const uint64x2_t even = vreinterpretq_u64_u8(vld1q_u8(rows[2 * r] + offset));
        const uint64x2_t odd = vreinterpretq_u64_u8(vld1q_u8(rows[2 * r + 1] + offset));
        bytes[0][r] = vreinterpretq_u8_u64(vzip1q_u64(even, odd));
        bytes[1][r] = vreinterpretq_u8_u64(vzip2q_u64(even, odd));
      }
      SPECFAST_UNROLL
      for (int half = 0; half < 2; half++) {
        if constexpr (BITS == 4) {
          uint8x16_t low[4], high[4];
          SPECFAST_UNROLL
          for (int r = 0; r < 4; r++) {
            low[r] = vandq_u8(bytes[half][r], vdupq_n_u8(15));
            high[r] = vshrq_n_u8(bytes[half][r], 4);
          }
          dot_eight<BLOCK, MT>(t, low, q, i / 8 + half);
          dot_eight<BLOCK, MT>(t, high, q, BLOCK / 16 + i / 8 + half);
        } else {
          dot_eight<BLOCK, MT>(t, bytes[half], q, i / 8 + half);
        }
      }
    }
    SPECFAST_UNROLL
    for (int r = 0; r < 2; r++) {
      const float32x4_t s = load(scales + static_cast<size_t>(b / group_blocks) * kPanel + 4 * r);
      const float32x4_t bias = load(biases + static_cast<size_t>(b / group_blocks) * kPanel + 4 * r);
      SPECFAST_UNROLL
      for (int m = 0; m < MT; m++) {
        const int32x4_t first = t[m / 2][2 * r], second = t[m / 2][2 * r + 1];
        const int32x4_t dots = m % 2 ? vuzp2q_s32(first, second) : vuzp1q_s32(first, second);
        acc[r][m] = vfmaq_f32(acc[r][m], bias, vdupq_n_f32(x.scaled_sum[at + m]));
        acc[r][m] = vfmaq_f32(acc[r][m], vcvtq_f32_s32(dots), vmulq_f32(s, vdupq_n_f32(x.scale[at + m])));
      }
    }
  }
  SPECFAST_UNROLL
  for (int r = 0; r < 2; r++) {
    SPECFAST_UNROLL
    for (int m = 0; m < MT; m++) store(tile + (m0 + m) * kPanel + 4 * r, acc[r][m]);
  }
}

/// The instruction of the dots, for the measurement of its peak.
constexpr int kDotProducts = 32;
inline void dot_once(int32x4_t& acc, int8x16_t a) {
  __asm__ volatile("usmmla %0.4s, %1.16b, %1.16b" : "+w"(acc) : "w"(a));
}

}  // namespace
