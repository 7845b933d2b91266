// The int8 panel of the two AVX2 tables: 8 rows transposed in registers once for all rows of activations, lanes are
// outputs. How a block's words are split and multiplied (BlockWeights, block_dots) comes from the header before.
#pragma once

namespace {

/// out[j] becomes word j of the 8 rows, at `offset` bytes, for 4 or 8 words.
template <int WORDS>
inline void transpose_words(const uint8_t* const* rows, size_t offset, __m256i* out) {
  __m256i a[8], b[8];
  SPECFAST_UNROLL
  for (int i = 0; i < 4; i++) {  // rows i and i + 4 share a register, so that four-word pieces end up side by side
    const __m128i* top = reinterpret_cast<const __m128i*>(rows[i] + offset);
    const __m128i* bottom = reinterpret_cast<const __m128i*>(rows[i + 4] + offset);
    a[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(top)), _mm_loadu_si128(bottom), 1);
    if constexpr (WORDS == 8)
      a[4 + i] =
          _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(top + 1)), _mm_loadu_si128(bottom + 1), 1);
  }
  SPECFAST_UNROLL
  for (int i = 0; i < WORDS; i += 4) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    b[i + 2] = _mm256_unpacklo_epi32(a[i + 2], a[i + 3]);
    b[i + 3] = _mm256_unpackhi_epi32(a[i + 2], a[i + 3]);
    out[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
    out[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
    out[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
    out[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
}

/// Scales (or biases) of 16 rows from n on as floats (groups, 16).
void transpose_scales(const Matrix& w, const void* scales, int n, float* out) {
  const size_t groups = w.groups(), bytes = w.scale_bytes(), chunk = 32 / bytes;
  for (int half = 0; half < kPanel; half += 8) {
    const uint8_t* rows[8];
    for (int i = 0; i < 8; i++)
      rows[i] =
          static_cast<const uint8_t*>(scales) + static_cast<size_t>(smaller(n + half + i, w.N - 1)) * groups * bytes;
    size_t g = 0;
    for (; g + chunk <= groups; g += chunk) {
      __m256i words[8];
      transpose_words<8>(rows, g * bytes, words);
      float* to = out + g * kPanel + half;
      for (int j = 0; j < 8; j++) {
        if (w.scale_format == Format::f32) {
          store(to + j * kPanel, _mm256_castsi256_ps(words[j]));
        } else if (w.scale_format == Format::bf16) {  // a word holds two neighbouring groups
          const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
          store(to + 2 * j * kPanel, _mm256_castsi256_ps(_mm256_slli_epi32(words[j], 16)));
          store(to + (2 * j + 1) * kPanel, _mm256_castsi256_ps(_mm256_and_si256(words[j], high)));
        } else {
          const __m256i low = _mm256_and_si256(words[j], _mm256_set1_epi32(0xffff));
          const __m256i high = _mm256_srli_epi32(words[j], 16);
          const __m256i both = _mm256_packus_epi32(low, high);  // low 0..3, high 0..3, low 4..7, high 4..7
          const __m256i split = _mm256_permute4x64_epi64(both, 0xd8);
          store(to + 2 * j * kPanel, _mm256_cvtph_ps(_mm256_castsi256_si128(split)));
          store(to + (2 * j + 1) * kPanel, _mm256_cvtph_ps(_mm256_extracti128_si256(split, 1)));
        }
      }
    }
    for (; g < groups; g++) {
      for (int i = 0; i < 8; i++)
        out[g * kPanel + static_cast<size_t>(half + i)] = scale_at(rows[i], w.scale_format, g);
    }
  }
}

void quantise_int8(const Rows& rows, Int8Layout layout, int k0, int k1) {
  const int block = block_of(layout);
  const Vec magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  // Bytes 0..7 are the even inputs of 16, bytes 8..15 the odd ones.
  const __m128i even_odd = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  quantise_blocks(rows, layout, k0, k1, [=](const float* x, int8_t* q) -> QuantisedBlock {
    Vec top = zero(), nan = zero();
    for (int i = 0; i < block; i += kLanes) {
      const Vec a = load(x + i);
      nan = _mm256_or_ps(nan, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
      top = max(_mm256_and_ps(a, magnitude), top);
    }
    const bool is_nan = _mm256_movemask_ps(nan) != 0;
    const float peak = maximum(top);
    const Vec inv = broadcast(is_nan ? 0.0f : peak > 0 ? 127.0f / peak : 0.0f);
    __m256i total = _mm256_setzero_si256();
    for (int i = 0; i < block; i += 16) {
      __m256i a = _mm256_cvtps_epi32(mul(load(x + i), inv)), b = _mm256_cvtps_epi32(mul(load(x + i + 8), inv));
      if (is_nan) a = b = _mm256_setzero_si256();
      __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
      pairs = _mm256_max_epi16(pairs, _mm256_set1_epi16(-128));  // what is no number counts as its byte
      total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
      const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
      if (interleaved(layout)) {
        const __m128i split = _mm_shuffle_epi8(bytes, even_odd);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(q + i / 2), split);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(q + block / 2 + i / 2), _mm_unpackhi_epi64(split, split));
      } else {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), bytes);
      }
    }
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
    return {peak, is_nan, _mm_cvtsi128_si32(half)};
  });
}

/// Adds one block of 8 outputs for MT rows to acc.
template <int BITS, int BLOCK, int MT>
inline void block_rows(const BlockWeights<BITS, BLOCK>& weights, const int8_t* q, const float* scale,
                       const float* scaled_sum, Vec s, Vec bias, Vec* acc) {
  __m256i t[MT];
  block_dots<BITS, BLOCK, MT>(weights, q, t);
  SPECFAST_UNROLL
  for (int m = 0; m < MT; m++) {
    acc[m] = fma(bias, broadcast(scaled_sum[m]), acc[m]);
    acc[m] = fma(_mm256_cvtepi32_ps(t[m]), mul(s, broadcast(scale[m])), acc[m]);
  }
}

/// 8 outputs for M rows, a block at a time.
template <int BITS, int BLOCK>
void int8_rows(const Matrix& w, const uint8_t* const* rows, const Int8Rows& x, int M, const float* scales,
               const float* biases, float* tile) {
  constexpr int kWords = BLOCK * BITS / 32;
  constexpr int kChunk = kWords < 8 ? kWords : 8;
  constexpr int kBlockBytes = BLOCK * BITS / 8;
  const int blocks = w.K / BLOCK, group_blocks = w.group / BLOCK;
  Vec acc[kTileRows];
  for (int m = 0; m < M; m++) acc[m] = zero();
  for (int b = 0; b < blocks; b++) {
    BlockWeights<BITS, BLOCK> weights;
    const size_t offset = static_cast<size_t>(b) * kBlockBytes;
    SPECFAST_UNROLL
    for (int j = 0; j < kWords; j += kChunk) {
      __m256i words[kChunk];
      transpose_words<kChunk>(rows, offset + 4 * static_cast<size_t>(j), words);
      SPECFAST_UNROLL
      for (int i = 0; i < kChunk; i++) weights.take(j + i, words[i]);
    }
    for (int i = 0; i < 8; i++) _mm_prefetch(reinterpret_cast<const char*>(rows[i] + offset + 512), _MM_HINT_T0);
    const Vec s = load(scales + static_cast<size_t>(b / group_blocks) * kPanel);
    const Vec bias = load(biases + static_cast<size_t>(b / group_blocks) * kPanel);
    const int8_t* q = x.q + static_cast<size_t>(b) * M * BLOCK;
    const float *scale = x.scale + static_cast<size_t>(b) * M, *sums = x.scaled_sum + static_cast<size_t>(b) * M;
    int m = 0;
    for (; m + 4 <= M; m += 4)
      block_rows<BITS, BLOCK, 4>(weights, q + m * BLOCK, scale + m, sums + m, s, bias, acc + m);
    switch (M - m) {
      case 1: block_rows<BITS, BLOCK, 1>(weights, q + m * BLOCK, scale + m, sums + m, s, bias, acc + m); break;
      case 2: block_rows<BITS, BLOCK, 2>(weights, q + m * BLOCK, scale + m, sums + m, s, bias, acc + m); break;
      case 3: block_rows<BITS, BLOCK, 3>(weights, q + m * BLOCK, scale + m, sums + m, s, bias, acc + m); break;
      default: break;
    }
  }
  for (int m = 0; m < M; m++) store(tile + m * kPanel, acc[m]);
}

void int8_panel(const Matrix& w, const Rows& x, int n, const float* scales, const float* biases, float* tile) {
  const Int8Layout layout = int8_layout(w.format, w.group);
  const Int8Rows& in = x.int8[layout];
  for (int r = 0; r < kPanel; r += 8) {
    const uint8_t* rows[8];
    for (int i = 0; i < 8; i++) rows[i] = panel_row(w, n, r + i);
    switch (layout) {
      case kQ4Block32: int8_rows<4, 32>(w, rows, in, x.M, scales + r, biases + r, tile + r); break;
      case kQ4Block64: int8_rows<4, 64>(w, rows, in, x.M, scales + r, biases + r, tile + r); break;
      case kQ8Block32: int8_rows<8, 32>(w, rows, in, x.M, scales + r, biases + r, tile + r); break;
      default: int8_rows<8, 64>(w, rows, in, x.M, scales + r, biases + r, tile + r); break;
    }
  }
}

}  // namespace
