// The int8 dots of AVX2 without VNNI.
//
// vpmaddubsw saturates at 16 bits, and two products of a byte by an int8 do not fit. So every weight byte is taken as
// two nibbles: a pair of products is at most 2 * 15 * 128 in magnitude and eight such pairs are below 2^15. Nibbles are
// the two inputs of a 4-bit byte, or the low and (times 16) the high half of an 8-bit weight.
#pragma once

namespace {

/// A block of 8 rows: word j of every row, its low nibbles and its high ones.
template <int BITS, int BLOCK>
struct BlockWeights {
  static constexpr int kWords = BLOCK * BITS / 32;
  __m256i low[kWords], high[kWords];

  void take(int j, __m256i word) {
    const __m256i nibble = _mm256_set1_epi8(15);
    low[j] = _mm256_and_si256(word, nibble);
    high[j] = _mm256_and_si256(_mm256_srli_epi16(word, 4), nibble);
  }
};

/// t[m] = the block's dots with row m of q, exactly.
template <int BITS, int BLOCK, int MT>
inline void block_dots(const BlockWeights<BITS, BLOCK>& w, const int8_t* q, __m256i* t) {
  constexpr int kWords = BlockWeights<BITS, BLOCK>::kWords;
  constexpr int kSpan = kWords < 8 ? kWords : 8;  // words whose pairs add up within 16 bits
  const __m256i ones = _mm256_set1_epi16(1);
  SPECFAST_UNROLL
  for (int m = 0; m < MT; m++) t[m] = _mm256_setzero_si256();
  SPECFAST_UNROLL
  for (int first = 0; first < kWords; first += kSpan) {
    __m256i a[MT], b[MT];
    SPECFAST_UNROLL
    for (int j = first; j < first + kSpan; j++) {
      SPECFAST_UNROLL
      for (int m = 0; m < MT; m++) {
        const int8_t* x = q + m * BLOCK + 4 * j;
        const __m256i u = broadcast_word(x), v = BITS == 4 ? broadcast_word(x + BLOCK / 2) : u;
        const __m256i c = _mm256_maddubs_epi16(w.low[j], u), d = _mm256_maddubs_epi16(w.high[j], v);
        a[m] = j == first ? c : _mm256_add_epi16(a[m], c);
        b[m] = j == first ? d : _mm256_add_epi16(b[m], d);
      }
    }
    SPECFAST_UNROLL
    for (int m = 0; m < MT; m++) {
      const __m256i weight = BITS == 4 ? ones : _mm256_set1_epi16(16);
      t[m] = _mm256_add_epi32(t[m], _mm256_add_epi32(_mm256_madd_epi16(a[m], ones), _mm256_madd_epi16(b[m], weight)));
    }
  }
}

/// One step of peak_dot's chain, a nibble's product and its addition, and its multiply-adds.
constexpr int kDotProducts = 32;
inline void dot_once(__m256i& acc, __m256i a) {
  __m256i product;
  __asm__ volatile("vpmaddubsw %2, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(a));
}

}  // namespace
