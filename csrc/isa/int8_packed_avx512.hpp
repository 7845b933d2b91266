// The int8 panel on AVX-512 over packed weights: one linear stream per panel, nothing to transpose. Same bits as in
// place.
#pragma once

namespace {

void pack_panel(const Matrix& w, int n, uint8_t* out) {
  const size_t scale_bytes = w.scale_bytes(), groups = w.groups();
  const size_t group_bytes = w.row_bytes() / groups;
  const uint8_t* rows[kPanel];
  for (int r = 0; r < kPanel; r++) rows[r] = panel_row(w, n, r);
  for (size_t g = 0; g < groups; g++) {
    const void* both[] = {w.scales, w.biases};
    for (const void* from : both) {
      for (int r = 0; r < kPanel; r++) {
        const size_t row = static_cast<size_t>(smaller(n + r, w.N - 1));
        std::memcpy(out, static_cast<const uint8_t*>(from) + (row * groups + g) * scale_bytes, scale_bytes);
        out += scale_bytes;
      }
    }
    for (size_t j = 0; j < group_bytes; j += 64) {
      alignas(64) __m512i words[kPanel];
      const size_t part = group_bytes - j < 64 ? group_bytes - j : 64;
      transpose_words(rows, g * group_bytes + j, static_cast<int>(part / 4), words);
      std::memcpy(out + kPanel * j, words, kPanel * part);
    }
    out += 16 * group_bytes;
  }
}

inline Vec load_scales(const uint8_t* p, Format format) {
  switch (format) {
    case Format::bf16: return load_bf16(reinterpret_cast<const uint16_t*>(p));
    case Format::f16: return load_f16(reinterpret_cast<const uint16_t*>(p));
    default: return load(reinterpret_cast<const float*>(p));
  }
}

/// Few rows wait for memory, more rows for the dot products: fetch near, or far and then near.
template <int M>
inline void fetch_ahead(const uint8_t* p) {
  if constexpr (M <= 3) {
    _mm_prefetch(reinterpret_cast<const char*>(p + 4608), _MM_HINT_T0);
  } else {
    _mm_prefetch(reinterpret_cast<const char*>(p + 18432), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(p + 1152), _MM_HINT_T0);
  }
}

template <int BITS, int BLOCK, int M>
void packed_panel_rows(const Matrix& w, const Int8Rows& x, int n, float* tile) {
  constexpr int kBlockWords = BLOCK * BITS / 32;
  constexpr int kChains = M <= 3 ? 2 : 1;
  const uint8_t* p = w.packed + static_cast<size_t>(n / kPanel) * w.panel_bytes();
  const int groups = static_cast<int>(w.groups()), group_blocks = w.group / BLOCK;
  const size_t scale_bytes = kPanel * w.scale_bytes();
  const int8_t* q = x.q;
  const float *scale = x.scale, *scaled_sum = x.scaled_sum;
  Vec acc[M];
  SPECFAST_UNROLL
  for (int m = 0; m < M; m++) acc[m] = zero();
  for (int g = 0; g < groups; g++) {
    const Vec s = load_scales(p, w.scale_format), b = load_scales(p + scale_bytes, w.scale_format);
    fetch_ahead<M>(p);
    p += 2 * scale_bytes;
    for (int h = 0; h < group_blocks; h++) {
      __m512i t[kChains][M];
      SPECFAST_UNROLL
      for (int i = 0; i < kChains; i++) {
        SPECFAST_UNROLL
        for (int m = 0; m < M; m++) t[i][m] = _mm512_setzero_si512();
      }
      SPECFAST_UNROLL
      for (int j = 0; j < kBlockWords; j++) {
        fetch_ahead<M>(p + 64 * j);
        dot_word<BITS, BLOCK, M, kChains>(_mm512_load_si512(p + 64 * j), j, q, t);
      }
      if constexpr (kChains == 2) {
        SPECFAST_UNROLL
        for (int m = 0; m < M; m++) t[0][m] = _mm512_add_epi32(t[0][m], t[1][m]);
      }
      add_block<M>(t[0], s, b, scale, scaled_sum, acc);
      p += 64 * kBlockWords;
      q += M * BLOCK;
      scale += M;
      scaled_sum += M;
    }
  }
  SPECFAST_UNROLL
  for (int m = 0; m < M; m++) store(tile + m * kPanel, acc[m]);
}

using PackedPanel = void (*)(const Matrix&, const Int8Rows&, int, float*);

template <int BITS, int BLOCK>
PackedPanel packed_panel_of(int M) {
  static constexpr PackedPanel kByRows[] = {
      packed_panel_rows<BITS, BLOCK, 1>,  packed_panel_rows<BITS, BLOCK, 2>,  packed_panel_rows<BITS, BLOCK, 3>,
      packed_panel_rows<BITS, BLOCK, 4>,  packed_panel_rows<BITS, BLOCK, 5>,  packed_panel_rows<BITS, BLOCK, 6>,
      packed_panel_rows<BITS, BLOCK, 7>,  packed_panel_rows<BITS, BLOCK, 8>,  packed_panel_rows<BITS, BLOCK, 9>,
      packed_panel_rows<BITS, BLOCK, 10>, packed_panel_rows<BITS, BLOCK, 11>, packed_panel_rows<BITS, BLOCK, 12>,
      packed_panel_rows<BITS, BLOCK, 13>, packed_panel_rows<BITS, BLOCK, 14>, packed_panel_rows<BITS, BLOCK, 15>,
      packed_panel_rows<BITS, BLOCK, 16>,
  };
  return kByRows[M - 1];
}

void int8_panel(const Matrix& w, const Rows& x, int n, const float* scales, const float* biases, float* tile) {
  const Int8Layout layout = int8_layout(w.format, w.group);
  const Int8Rows& in = x.int8[layout];
  switch (layout) {
    case kQ4Block32:
      return w.packed ? packed_panel_of<4, 32>(x.M)(w, in, n, tile)
                      : int8_panel_of<4, 32>(w, in, x.M, n, scales, biases, tile);
    case kQ4Block64:
      return w.packed ? packed_panel_of<4, 64>(x.M)(w, in, n, tile)
                      : int8_panel_of<4, 64>(w, in, x.M, n, scales, biases, tile);
    case kQ8Block32:
      return w.packed ? packed_panel_of<8, 32>(x.M)(w, in, n, tile)
                      : int8_panel_of<8, 32>(w, in, x.M, n, scales, biases, tile);
    default:
      return w.packed ? packed_panel_of<8, 64>(x.M)(w, in, n, tile)
                      : int8_panel_of<8, 64>(w, in, x.M, n, scales, biases, tile);
  }
}

}  // namespace
