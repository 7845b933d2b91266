// The int8 panel on AVX-512 VNNI: MLX's rows read in place, 64 bytes of 16 rows transposed in registers while the
// previous 64 are multiplied, so that lanes are outputs and no horizontal sums remain.
#pragma once

namespace {

inline QuantisedBlock quantise_block(const float* x, bool is_interleaved, int block, int8_t* q) {
  const int vectors = block / 16;
  Vec v[4];
  Vec top = zero();
  __mmask16 nan = 0;
  for (int i = 0; i < vectors; i++) {
    v[i] = load(x + 16 * i);
    nan = static_cast<__mmask16>(nan | _mm512_cmp_ps_mask(v[i], v[i], _CMP_UNORD_Q));
    top = _mm512_max_ps(top, _mm512_abs_ps(v[i]));
  }
  const float peak = maximum(top);
  const Vec inv = broadcast(peak > 0 ? 127.0f / peak : 0.0f);
  alignas(64) int8_t plain[64];
  __m512i total = _mm512_setzero_si512();
  for (int i = 0; i < vectors; i++) {
    const __m512i rounded = _mm512_maskz_cvtps_epi32(nan ? 0 : 0xffff, mul(v[i], inv));
    const __m128i bytes = _mm512_cvtsepi32_epi8(rounded);
    total = _mm512_add_epi32(total, _mm512_cvtepi8_epi32(bytes));
    _mm_store_si128(reinterpret_cast<__m128i*>(plain + 16 * i), bytes);
  }
  if (is_interleaved) {
    const __m512i even_odd =
        _mm512_set_epi64(0x0f0d0b0907050301, 0x0e0c0a0806040200, 0x0f0d0b0907050301, 0x0e0c0a0806040200,
                         0x0f0d0b0907050301, 0x0e0c0a0806040200, 0x0f0d0b0907050301, 0x0e0c0a0806040200);
    const __m512i halves =
        block == 64 ? _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0) : _mm512_set_epi64(7, 6, 5, 4, 3, 1, 2, 0);
    const __m512i split = _mm512_permutexvar_epi64(halves, _mm512_shuffle_epi8(_mm512_load_si512(plain), even_odd));
    _mm512_store_si512(plain, split);
  }
  std::memcpy(q, plain, static_cast<size_t>(block));
  return {peak, nan != 0, _mm512_reduce_add_epi32(total)};
}

void quantise_int8(const Rows& rows, Int8Layout layout, int k0, int k1) {
  const int block = block_of(layout);
  quantise_blocks(rows, layout, k0, k1,
                  [=](const float* x, int8_t* q) { return quantise_block(x, interleaved(layout), block, q); });
}

/// Step i of 4 of a 16x16 transpose of 32-bit words: rows 4i.. into tmp.
inline void transpose_first(const uint8_t* const* rows, size_t offset, __mmask16 words, int i, __m512i* tmp) {
  const __m512i r0 = _mm512_maskz_loadu_epi32(words, rows[4 * i] + offset);
  const __m512i r1 = _mm512_maskz_loadu_epi32(words, rows[4 * i + 1] + offset);
  const __m512i r2 = _mm512_maskz_loadu_epi32(words, rows[4 * i + 2] + offset);
  const __m512i r3 = _mm512_maskz_loadu_epi32(words, rows[4 * i + 3] + offset);
  const __m512i a = _mm512_unpacklo_epi32(r0, r1), b = _mm512_unpackhi_epi32(r0, r1);
  const __m512i c = _mm512_unpacklo_epi32(r2, r3), d = _mm512_unpackhi_epi32(r2, r3);
  _mm512_store_si512(tmp + 4 * i, _mm512_unpacklo_epi64(a, c));
  _mm512_store_si512(tmp + 4 * i + 1, _mm512_unpackhi_epi64(a, c));
  _mm512_store_si512(tmp + 4 * i + 2, _mm512_unpacklo_epi64(b, d));
  _mm512_store_si512(tmp + 4 * i + 3, _mm512_unpackhi_epi64(b, d));
}

/// Step k of 4 of the second half: out[j] then holds word j of the 16 rows, for j = k, 4 + k, 8 + k, 12 + k.
inline void transpose_second(const __m512i* tmp, int k, __m512i* out) {
  const __m512i r0 = _mm512_load_si512(tmp + k), r1 = _mm512_load_si512(tmp + 4 + k);
  const __m512i r2 = _mm512_load_si512(tmp + 8 + k), r3 = _mm512_load_si512(tmp + 12 + k);
  const __m512i a = _mm512_shuffle_i32x4(r0, r1, 0x88), b = _mm512_shuffle_i32x4(r0, r1, 0xdd);
  const __m512i c = _mm512_shuffle_i32x4(r2, r3, 0x88), d = _mm512_shuffle_i32x4(r2, r3, 0xdd);
  _mm512_store_si512(out + k, _mm512_shuffle_i32x4(a, c, 0x88));
  _mm512_store_si512(out + 8 + k, _mm512_shuffle_i32x4(a, c, 0xdd));
  _mm512_store_si512(out + 4 + k, _mm512_shuffle_i32x4(b, d, 0x88));
  _mm512_store_si512(out + 12 + k, _mm512_shuffle_i32x4(b, d, 0xdd));
}

inline void transpose_words(const uint8_t* const* rows, size_t offset, int words, __m512i* out) {
  alignas(64) __m512i tmp[16];
  for (int i = 0; i < 4; i++) transpose_first(rows, offset, low_lanes(words), i, tmp);
  for (int i = 0; i < 4; i++) transpose_second(tmp, i, out);
}

/// Scales (or biases) of 16 rows from n on as floats (groups, 16).
void transpose_scales(const Matrix& w, const void* scales, int n, float* out) {
  const int groups = static_cast<int>(w.groups());
  const size_t row_bytes = static_cast<size_t>(groups) * w.scale_bytes();
  const uint8_t* rows[kPanel];
  for (int i = 0; i < kPanel; i++)
    rows[i] = static_cast<const uint8_t*>(scales) + static_cast<size_t>(smaller(n + i, w.N - 1)) * row_bytes;
  alignas(64) __m512i words[16];
  if (w.scale_format == Format::f32) {
    for (int g = 0; g < groups; g += 16) {
      const int part = smaller(16, groups - g);
      transpose_words(rows, static_cast<size_t>(g) * 4, part, words);
      for (int i = 0; i < part; i++) _mm512_storeu_si512(out + (g + i) * kPanel, words[i]);
    }
    return;
  }
  for (int g = 0; g < groups; g += 32) {  // a word holds two neighbouring groups
    const int part = smaller(32, groups - g);
    if (part % 2 == 0) {
      transpose_words(rows, static_cast<size_t>(g) * 2, part / 2, words);
    } else {  // an odd count must not read past the last row
      alignas(64) uint16_t copy[kPanel][32];
      const uint8_t* copies[kPanel];
      for (int i = 0; i < kPanel; i++) {
        const __m512i row = _mm512_maskz_loadu_epi16(part == 32 ? 0xffffffffu : (1u << part) - 1u,
                                                     rows[i] + static_cast<size_t>(g) * 2);
        _mm512_store_si512(copy[i], row);
        copies[i] = reinterpret_cast<const uint8_t*>(copy[i]);
      }
      transpose_words(copies, 0, (part + 1) / 2, words);
    }
    for (int i = 0; i < part; i++) {
      const __m512i word = words[i / 2];
      Vec value;
      if (w.scale_format == Format::bf16) {
        value = _mm512_castsi512_ps(i % 2 ? _mm512_and_si512(word, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))
                                          : _mm512_slli_epi32(word, 16));
      } else {
        value = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(i % 2 ? _mm512_srli_epi32(word, 16) : word));
      }
      store(out + (g + i) * kPanel, value);
    }
  }
}

typedef int32_t __attribute__((may_alias)) Word;

// As an intrinsic with a broadcast operand, compilers hoist the 16 broadcasts out of the loop and spill them.
inline void dot_bytes(__m512i& acc, __m512i weights, const int8_t* x) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(weights), "m"(*reinterpret_cast<const Word*>(x)));
}

/// Adds one block's integer dots to the float sums: bias first, then scale, each one fused multiply-add. `scale` and
/// `scaled_sum` are the block's (M,).
template <int M>
inline void add_block(const __m512i* t, Vec s, Vec b, const float* scale, const float* scaled_sum, Vec* acc) {
  SPECFAST_UNROLL
  for (int m = 0; m < M; m++) {
    acc[m] = fma(b, broadcast(scaled_sum[m]), acc[m]);
    acc[m] = fma(_mm512_cvtepi32_ps(t[m]), mul(s, broadcast(scale[m])), acc[m]);
  }
}

/// Multiplies word j of a block with its 4 (8-bit) or 8 (4-bit) inputs of every row.
template <int BITS, int BLOCK, int M, int CHAINS>
inline void dot_word(__m512i word, int j, const int8_t* q, __m512i (*t)[M]) {
  if constexpr (BITS == 4) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i low = _mm512_and_si512(word, nibble), high = _mm512_and_si512(_mm512_srli_epi32(word, 4), nibble);
    SPECFAST_UNROLL
    for (int m = 0; m < M; m++) dot_bytes(t[0][m], low, q + m * BLOCK + 4 * j);
    SPECFAST_UNROLL
    for (int m = 0; m < M; m++) dot_bytes(t[CHAINS - 1][m], high, q + m * BLOCK + BLOCK / 2 + 4 * j);
  } else {
    SPECFAST_UNROLL
    for (int m = 0; m < M; m++) dot_bytes(t[j % CHAINS][m], word, q + m * BLOCK + 4 * j);
  }
}

/// 16 outputs from row n on for M rows, 64 bytes of 16 weight rows at a time; the next 64 bytes are transposed through
/// the first-level cache meanwhile, a step per two multiplied words.
template <int BITS, int BLOCK, int M>
void int8_panel_rows(const Matrix& w, const Int8Rows& x, int n, const float* scales, const float* biases, float* tile) {
  constexpr int kBlockWords = BLOCK * BITS / 32;
  constexpr int kChunkBlocks = 16 / kBlockWords;
  constexpr int kChains = M <= 3 ? 2 : 1;
  alignas(64) __m512i ready[2][16], tmp[16];
  const uint8_t* rows[kPanel];
  for (int i = 0; i < kPanel; i++) rows[i] = panel_row(w, n, i);
  const size_t row_bytes = w.row_bytes();
  const int words = static_cast<int>(row_bytes / 4);
  const int chunks = (words + 15) / 16;
  // The next panel, its scales and biases are fetched while this one is used.
  const uint8_t* ahead = rows[0] + kPanel * row_bytes;
  const size_t panel_scales = kPanel * w.groups() * w.scale_bytes(),
               scale_share = panel_scales / static_cast<size_t>(chunks);
  const size_t after = static_cast<size_t>(n / kPanel + 1) * panel_scales;
  const char* next_scales = static_cast<const char*>(w.scales) + after;
  const char* next_biases = static_cast<const char*>(w.biases) + after;
  const int group_shift = w.group / BLOCK == 2 ? 1 : 0;
  const int8_t* q = x.q;
  const float *scale = x.scale, *scaled_sum = x.scaled_sum;
  int block = 0;
  Vec acc[M];
  SPECFAST_UNROLL
  for (int m = 0; m < M; m++) acc[m] = zero();

  transpose_words(rows, 0, smaller(words, 16), ready[0]);
  for (int c = 0; c < chunks; c++) {
    const uint8_t* fetch = ahead + static_cast<size_t>(c) * 1024;
    SPECFAST_UNROLL
    for (int i = 0; i < 16; i++) {
      _mm_prefetch(reinterpret_cast<const char*>(fetch + i * 64), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(rows[i] + c * 64 + 128), _MM_HINT_T0);
    }
    for (size_t at = 0; at < scale_share; at += 64) {
      _mm_prefetch(next_scales + at, _MM_HINT_T1);
      _mm_prefetch(next_biases + at, _MM_HINT_T1);
    }
    next_scales += scale_share;
    next_biases += scale_share;
    const int left = words - 16 * c;
    const __m512i* current = ready[c & 1];
    __m512i* next = ready[(c & 1) ^ 1];
    const int next_words = left - 16 > 0 ? smaller(left - 16, 16) : 0;
    const size_t next_offset = next_words ? static_cast<size_t>(c + 1) * 64 : 0;
    SPECFAST_UNROLL
    for (int h = 0; h < kChunkBlocks; h++) {
      if (h * kBlockWords >= left) break;
      __m512i t[kChains][M];
      SPECFAST_UNROLL
      for (int i = 0; i < kChains; i++) {
        SPECFAST_UNROLL
        for (int m = 0; m < M; m++) t[i][m] = _mm512_setzero_si512();
      }
      SPECFAST_UNROLL
      for (int j = 0; j < kBlockWords; j++) {
        const int at = h * kBlockWords + j;
        dot_word<BITS, BLOCK, M, kChains>(_mm512_load_si512(current + at), j, q, t);
        if (at % 2 == 0) {
          if (at < 8) {
            transpose_first(rows, next_offset, low_lanes(next_words), at / 2, tmp);
          } else {
            transpose_second(tmp, at / 2 - 4, next);
          }
        }
      }
      if constexpr (kChains == 2) {
        SPECFAST_UNROLL
        for (int m = 0; m < M; m++) t[0][m] = _mm512_add_epi32(t[0][m], t[1][m]);
      }
      const size_t at = static_cast<size_t>(block >> group_shift) * kPanel;
      add_block<M>(t[0], load(scales + at), load(biases + at), scale, scaled_sum, acc);
      q += M * BLOCK;
      scale += M;
      scaled_sum += M;
      block++;
    }
  }
  SPECFAST_UNROLL
  for (int m = 0; m < M; m++) store(tile + m * kPanel, acc[m]);
}

template <int BITS, int BLOCK>
void int8_panel_of(const Matrix& w, const Int8Rows& x, int M, int n, const float* s, const float* b, float* tile) {
  switch (M) {
    case 1: return int8_panel_rows<BITS, BLOCK, 1>(w, x, n, s, b, tile);
    case 2: return int8_panel_rows<BITS, BLOCK, 2>(w, x, n, s, b, tile);
    case 3: return int8_panel_rows<BITS, BLOCK, 3>(w, x, n, s, b, tile);
    case 4: return int8_panel_rows<BITS, BLOCK, 4>(w, x, n, s, b, tile);
    case 5: return int8_panel_rows<BITS, BLOCK, 5>(w, x, n, s, b, tile);
    case 6: return int8_panel_rows<BITS, BLOCK, 6>(w, x, n, s, b, tile);
    case 7: return int8_panel_rows<BITS, BLOCK, 7>(w, x, n, s, b, tile);
    case 8: return int8_panel_rows<BITS, BLOCK, 8>(w, x, n, s, b, tile);
    case 9: return int8_panel_rows<BITS, BLOCK, 9>(w, x, n, s, b, tile);
    case 10: return int8_panel_rows<BITS, BLOCK, 10>(w, x, n, s, b, tile);
    case 11: return int8_panel_rows<BITS, BLOCK, 11>(w, x, n, s, b, tile);
    case 12: return int8_panel_rows<BITS, BLOCK, 12>(w, x, n, s, b, tile);
    case 13: return int8_panel_rows<BITS, BLOCK, 13>(w, x, n, s, b, tile);
    case 14: return int8_panel_rows<BITS, BLOCK, 14>(w, x, n, s, b, tile);
    case 15: return int8_panel_rows<BITS, BLOCK, 15>(w, x, n, s, b, tile);
    default: return int8_panel_rows<BITS, BLOCK, 16>(w, x, n, s, b, tile);
  }
}

}  // namespace
