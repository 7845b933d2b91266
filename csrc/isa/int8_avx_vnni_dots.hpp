// The int8 dots of AVX-VNNI: vpdpbusd multiplies unsigned bytes by signed ones and adds in 32 bits, where nothing
// saturates. The sums are exact, so they are those of AVX2.
#pragma once

namespace {

/// A block of 8 rows: word j of every row, 4 bits as low and high nibbles, 8 bits whole.
template <int BITS, int BLOCK>
struct BlockWeights {
  static constexpr int kWords = BLOCK * BITS / 32;
  __m256i low[kWords], high[BITS == 4 ? kWords : 1];

  void take(int j, __m256i word) {
    const __m256i nibble = _mm256_set1_epi8(15);
    low[j] = BITS == 4 ? _mm256_and_si256(word, nibble) : word;
    if constexpr (BITS == 4) high[j] = _mm256_and_si256(_mm256_srli_epi16(word, 4), nibble);
  }
};

/// t[m] = the block's dots with row m of q, exactly; two chains of additions per row hide their latency.
template <int BITS, int BLOCK, int MT>
inline void block_dots(const BlockWeights<BITS, BLOCK>& w, const int8_t* q, __m256i* t) {
  constexpr int kWords = BlockWeights<BITS, BLOCK>::kWords;
  __m256i other[MT];
  SPECFAST_UNROLL
  for (int m = 0; m < MT; m++) t[m] = other[m] = _mm256_setzero_si256();
  SPECFAST_UNROLL
  for (int j = 0; j < kWords; j += BITS == 4 ? 1 : 2) {
    SPECFAST_UNROLL
    for (int m = 0; m < MT; m++) {
      const int8_t* x = q + m * BLOCK + 4 * j;
      const __m256i second = BITS == 4 ? w.high[BITS == 4 ? j : 0] : w.low[j + 1 < kWords ? j + 1 : j];
      t[m] = _mm256_dpbusd_avx_epi32(t[m], w.low[j], broadcast_word(x));
      other[m] = _mm256_dpbusd_avx_epi32(other[m], second, broadcast_word(x + (BITS == 4 ? BLOCK / 2 : 4)));
    }
  }
  SPECFAST_UNROLL
  for (int m = 0; m < MT; m++) t[m] = _mm256_add_epi32(t[m], other[m]);
}

/// One step of peak_dot's chain, and its multiply-adds.
constexpr int kDotProducts = 32;
inline void dot_once(__m256i& acc, __m256i a) {
  __asm__ volatile("%{vex%} vpdpbusd %1, %1, %0" : "+x"(acc) : "x"(a));
}

}  // namespace
