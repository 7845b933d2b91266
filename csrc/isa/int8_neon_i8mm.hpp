// Integer dots of a block on NEON i8mm: products of two weight rows with two rows of activations, eight inputs at a
// time.
#pragma once

#if !defined(__ARM_FEATURE_MATMUL_INT8)
#error "compile with -march=armv8.2-a+dotprod+i8mm"
#endif

namespace {

/// Quantises, then lays rows m and m + 1 (m even) of a block side by side: eight inputs of one, the same eight of the
/// other. The last of an odd number of rows stays as it is.
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

/// Multiplies eight inputs of 2 P weight rows with those of MT rows: t[p][r] holds weight row 2r with rows 2p and
/// 2p + 1, then weight row 2r + 1. `q` is the block of the first row, `eight` counts its eights.
template <int BLOCK, int P, int MT>
inline void dot_eight(int32x4_t (*t)[P], const uint8x16_t* weights, const int8_t* q, int eight) {
  SPECFAST_UNROLL
  for (int p = 0; 2 * p < MT; p++) {
    const int8_t* pair = q + 2 * p * BLOCK;
    int8x16_t x;
    if (2 * p + 1 < MT) {
      x = vld1q_s8(pair + 16 * eight);
    } else {
      int64_t alone;
      std::memcpy(&alone, pair + 8 * eight, 8);
      x = vreinterpretq_s8_s64(vdupq_n_s64(alone));
    }
    SPECFAST_UNROLL
    for (int r = 0; r < P; r++) t[p][r] = vusmmlaq_s32(t[p][r], weights[r], x);
  }
}

/// dots[r][m] becomes the dots of weight rows 4r.. with row m of a block whose first row (of even number) lies at `q`.
template <int BITS, int BLOCK, int R, int MT>
inline void block_dots(const uint8_t* const* rows, size_t offset, const int8_t* q, const int32_t*,
                       int32x4_t (*dots)[MT]) {
  constexpr int P = 2 * R;
  int32x4_t t[(MT + 1) / 2][P];
  SPECFAST_UNROLL
  for (int p = 0; 2 * p < MT; p++) {
    SPECFAST_UNROLL
    for (int r = 0; r < P; r++) t[p][r] = vdupq_n_s32(0);
  }
  for (int i = 0; i < BLOCK * BITS / 8; i += 16) {
    uint8x16_t bytes[2][P];  // the first and the last eight of two weight rows
    SPECFAST_UNROLL
    for (int r = 0; r < P; r++) {
      const uint64x2_t even = vreinterpretq_u64_u8(vld1q_u8(rows[2 * r] + offset + i));
      const uint64x2_t odd = vreinterpretq_u64_u8(vld1q_u8(rows[2 * r + 1] + offset + i));
      bytes[0][r] = vreinterpretq_u8_u64(vzip1q_u64(even, odd));
      bytes[1][r] = vreinterpretq_u8_u64(vzip2q_u64(even, odd));
    }
    SPECFAST_UNROLL
    for (int half = 0; half < 2; half++) {
      const int eight = i / 8 + half;
      if constexpr (BITS == 4) {
        uint8x16_t low[P], high[P];
        SPECFAST_UNROLL
        for (int r = 0; r < P; r++) {
          low[r] = vandq_u8(bytes[half][r], vdupq_n_u8(15));
          high[r] = vshrq_n_u8(bytes[half][r], 4);
        }
        dot_eight<BLOCK, P, MT>(t, low, q, eight);
        dot_eight<BLOCK, P, MT>(t, high, q, BLOCK / 16 + eight);
      } else {
        dot_eight<BLOCK, P, MT>(t, bytes[half], q, eight);
      }
    }
  }
  SPECFAST_UNROLL
  for (int r = 0; r < R; r++) {
    SPECFAST_UNROLL
    for (int m = 0; m < MT; m++) {
      const int32x4_t first = t[m / 2][2 * r], second = t[m / 2][2 * r + 1];
      dots[r][m] = m % 2 ? vuzp2q_s32(first, second) : vuzp1q_s32(first, second);
    }
  }
}

/// The instruction of the dots, for the measurement of its peak.
constexpr int kDotProducts = 32;
inline void dot_once(int32x4_t& acc, int8x16_t a) {
  __asm__ volatile("usmmla %0.4s, %1.16b, %1.16b" : "+w"(acc) : "w"(a));
}

}  // namespace
