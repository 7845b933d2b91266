// The int8 panel on AVX-512 over packed weights: one linear stream per panel, nothing to transpose. Same bits as in
// place.
#pragma once

#include <utility>

namespace {

/// Writes packed panel n / 16 of quantised weights.
void pack_quantised(const Matrix& w, int n, uint8_t* out) {
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

constexpr int kFewRows = 3;    // they wait for memory and take one panel at a time
constexpr int kPairRows = 12;  // their sums for two panels fit the registers

/// Asks for the line a panel's stream reaches a little later. Past the panel's end the thread goes on `skip` bytes
/// later.
struct Fetch {
  static constexpr ptrdiff_t kAhead = 4608;
  ptrdiff_t ahead = kAhead;

  Fetch() = default;  // the next panel follows
  Fetch(ptrdiff_t done, ptrdiff_t panel_bytes, ptrdiff_t skip)
      : ahead(done + kAhead < panel_bytes ? kAhead : kAhead + skip) {}
  void line(const uint8_t* p) const { _mm_prefetch(reinterpret_cast<const char*>(p + ahead), _MM_HINT_T0); }
};

/// A word of the activations in all lanes. As an intrinsic, compilers move it out of the loop and spill it.
inline __m512i broadcast_word(const int8_t* x) {
  __m512i word;
  __asm__("vpbroadcastd %1, %0" : "=v"(word) : "m"(*reinterpret_cast<const Word*>(x)));
  return word;
}

inline void dot_bytes(__m512i& acc, __m512i weights, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(x));
}

/// 32 outputs for M rows: panel `na` of a and panel `nb` of b, which share every load of an activation.
template <int BITS, int BLOCK, int M>
void packed_panels(const Matrix& a, int na, const Matrix& b, int nb, const Int8Rows& x, float* tile_a, float* tile_b) {
  constexpr int kBlockWords = BLOCK * BITS / 32;
  const size_t panel_bytes = a.panel_bytes();
  const uint8_t* p[2] = {a.packed + static_cast<size_t>(na / kPanel) * panel_bytes,
                         b.packed + static_cast<size_t>(nb / kPanel) * panel_bytes};
  const ptrdiff_t size = static_cast<ptrdiff_t>(panel_bytes), skip = a.packed == b.packed ? size : 0;
  const uint8_t* const start = p[0];
  const int groups = static_cast<int>(a.groups()), group_blocks = a.group / BLOCK;
  const size_t scale_bytes = kPanel * a.scale_bytes();
  const int8_t* q = x.q;
  const float *scale = x.scale, *scaled_sum = x.scaled_sum;
  Vec acc[2][M];
  SPECFAST_UNROLL
  for (int m = 0; m < M; m++) acc[0][m] = acc[1][m] = zero();
  for (int g = 0; g < groups; g++) {
    const Fetch fetch(p[0] - start, size, skip);
    Vec s[2], bias[2];
    SPECFAST_UNROLL
    for (int i = 0; i < 2; i++) {
      s[i] = load_scales(p[i], a.scale_format);
      bias[i] = load_scales(p[i] + scale_bytes, a.scale_format);
      fetch.line(p[i]);
      p[i] += 2 * scale_bytes;
    }
    for (int h = 0; h < group_blocks; h++) {
      __m512i t[2][M];
      SPECFAST_UNROLL
      for (int m = 0; m < M; m++) t[0][m] = t[1][m] = _mm512_setzero_si512();
      SPECFAST_UNROLL
      for (int j = 0; j < kBlockWords; j++) {
        __m512i low[2], high[2];
        SPECFAST_UNROLL
        for (int i = 0; i < 2; i++) {
          fetch.line(p[i] + 64 * j);
          const __m512i word = _mm512_load_si512(p[i] + 64 * j), nibble = _mm512_set1_epi8(15);
          low[i] = BITS == 4 ? _mm512_and_si512(word, nibble) : word;
          if constexpr (BITS == 4) high[i] = _mm512_and_si512(_mm512_srli_epi32(word, 4), nibble);
        }
        SPECFAST_UNROLL
        for (int m = 0; m < M; m++) {
          const __m512i in = broadcast_word(q + m * BLOCK + 4 * j);
          SPECFAST_UNROLL
          for (int i = 0; i < 2; i++) dot_bytes(t[i][m], low[i], in);
        }
        if constexpr (BITS == 4) {
          SPECFAST_UNROLL
          for (int m = 0; m < M; m++) {
            const __m512i in = broadcast_word(q + m * BLOCK + BLOCK / 2 + 4 * j);
            SPECFAST_UNROLL
            for (int i = 0; i < 2; i++) dot_bytes(t[i][m], high[i], in);
          }
        }
      }
      SPECFAST_UNROLL
      for (int i = 0; i < 2; i++) {
        add_block<M>(t[i], s[i], bias[i], scale, scaled_sum, acc[i]);
        p[i] += 64 * kBlockWords;
      }
      q += M * BLOCK;
      scale += M;
      scaled_sum += M;
    }
  }
  SPECFAST_UNROLL
  for (int m = 0; m < M; m++) {
    store(tile_a + m * kPanel, acc[0][m]);
    store(tile_b + m * kPanel, acc[1][m]);
  }
}

/// 16 outputs for M rows: panel n of w.
template <int BITS, int BLOCK, int M>
void packed_panel(const Matrix& w, const Int8Rows& x, int n, float* tile) {
  constexpr int kBlockWords = BLOCK * BITS / 32;
  constexpr int kChains = M <= kFewRows ? 2 : 1;
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
    const Fetch fetch;
    fetch.line(p);
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
        fetch.line(p + 64 * j);
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

template <int BITS, int BLOCK, int M>
void packed_panels_or_each(const Matrix& a, int na, const Matrix& b, int nb, const Int8Rows& x, float* tile_a,
                           float* tile_b) {
  if constexpr (M > kFewRows && M <= kPairRows) {
    packed_panels<BITS, BLOCK, M>(a, na, b, nb, x, tile_a, tile_b);
  } else {
    packed_panel<BITS, BLOCK, M>(a, x, na, tile_a);
    packed_panel<BITS, BLOCK, M>(b, x, nb, tile_b);
  }
}

using PackedPanels = void (*)(const Matrix&, int, const Matrix&, int, const Int8Rows&, float*, float*);

template <int BITS, int BLOCK, int... M>
PackedPanels packed_panels_of(int rows, std::integer_sequence<int, M...>) {
  static constexpr PackedPanels kByRows[] = {packed_panels_or_each<BITS, BLOCK, M + 1>...};
  return kByRows[rows - 1];
}

/// Two packed panels of one format and K at once.
void int8_panels(const Matrix& a, int na, const Matrix& b, int nb, const Rows& x, float* tile_a, float* tile_b) {
  const Int8Layout layout = int8_layout(a.format, a.group);
  const Int8Rows& in = x.int8[layout];
  constexpr std::make_integer_sequence<int, kTileRows> rows;
  switch (layout) {
    case kQ4Block32: return packed_panels_of<4, 32>(x.M, rows)(a, na, b, nb, in, tile_a, tile_b);
    case kQ4Block64: return packed_panels_of<4, 64>(x.M, rows)(a, na, b, nb, in, tile_a, tile_b);
    case kQ8Block32: return packed_panels_of<8, 32>(x.M, rows)(a, na, b, nb, in, tile_a, tile_b);
    default: return packed_panels_of<8, 64>(x.M, rows)(a, na, b, nb, in, tile_a, tile_b);
  }
}

void int8_panel(const Matrix& w, const Rows& x, int n, const float* scales, const float* biases, float* tile) {
  if (w.packed) return int8_panels(w, n, w, n, x, tile, tile);
  const Int8Layout layout = int8_layout(w.format, w.group);
  const Int8Rows& in = x.int8[layout];
  switch (layout) {
    case kQ4Block32: return int8_panel_of<4, 32>(w, in, x.M, n, scales, biases, tile);
    case kQ4Block64: return int8_panel_of<4, 64>(w, in, x.M, n, scales, biases, tile);
    case kQ8Block32: return int8_panel_of<8, 32>(w, in, x.M, n, scales, biases, tile);
    default: return int8_panel_of<8, 64>(w, in, x.M, n, scales, biases, tile);
  }
}

#define SPECFAST_PANEL_PAIRS 1

}  // namespace
