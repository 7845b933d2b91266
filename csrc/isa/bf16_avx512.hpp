// The bf16 panel on AVX-512: 16 outputs side by side, two inputs to a dot. Over packed weights it is one linear stream;
// rows read in place are transposed in registers. Both give the same bits.
#pragma once

#include <utility>

namespace {

/// Inputs of a block: 16 words of two to each of the 16 weight rows.
constexpr int kBf16Block = 32;
constexpr int kBf16Rows = 14;  // their sums for two panels fit the registers

struct Bf16Input {
  const uint16_t* x;
  int64_t stride;  // elements
};

/// Block `k / 32` of the 16 rows of a panel, word j of all rows in words[j]; nothing is read past the end of a row.
inline void transpose_bf16(const uint8_t* const* rows, int K, int k, __m512i* words) {
  if (K - k >= kBf16Block) return transpose_words(rows, static_cast<size_t>(k) * 2, 16, words);
  alignas(64) uint16_t copy[kPanel][kBf16Block];
  const uint8_t* copies[kPanel];
  for (int r = 0; r < kPanel; r++) {
    _mm512_store_si512(copy[r], _mm512_maskz_loadu_epi16((1u << (K - k)) - 1u, rows[r] + static_cast<size_t>(k) * 2));
    copies[r] = reinterpret_cast<const uint8_t*>(copy[r]);
  }
  transpose_words(copies, 0, 16, words);
}

/// Writes packed panel n / 16 of bf16 weights, whose K is even.
void pack_bf16(const Matrix& w, int n, uint8_t* out) {
  const uint8_t* rows[kPanel];
  for (int r = 0; r < kPanel; r++) rows[r] = panel_row(w, n, r);
  for (int k = 0; k < w.K; k += kBf16Block) {
    alignas(64) __m512i words[kPanel];
    transpose_bf16(rows, w.K, k, words);
    const size_t part = 32 * static_cast<size_t>(smaller(kBf16Block, w.K - k));
    std::memcpy(out, words, part);
    out += part;
  }
}

inline void add_pairs(Vec& acc, __m512i weights, __m512i x) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(x));
}
inline void add_pairs(Vec& acc, __m512i weights, const uint16_t* x) {
  __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(weights), "m"(*reinterpret_cast<const Word*>(x)));
}

/// Rows of x at multiples of a stride, found from few registers: m = odd part times a power of two, which an address
/// can scale by.
template <int M>
struct RowOffsets {
  ptrdiff_t odd[(M + 1) / 2];  // (2 i + 1) strides, bytes

  explicit RowOffsets(int64_t stride) {
    SPECFAST_UNROLL
    for (int i = 0; i < (M + 1) / 2; i++) odd[i] = (2 * i + 1) * 2 * stride;
  }
  const uint16_t* row(const uint16_t* x, int m) const {
    if (m == 0) return x;
    const int shift = __builtin_ctz(static_cast<unsigned>(m));
    return reinterpret_cast<const uint16_t*>(reinterpret_cast<const char*>(x) + odd[(m >> shift) / 2] * (1 << shift));
  }
};

/// Adds the products of one word of each panel with the inputs at x.
template <int P, int M>
[[gnu::always_inline]] inline void dot_bf16(const __m512i* const (&words)[P], const uint16_t* x,
                                            const RowOffsets<M>& rows, Vec (&acc)[P][M]) {
  __m512i word[P];
  SPECFAST_UNROLL
  for (int i = 0; i < P; i++) word[i] = _mm512_load_si512(words[i]);
  SPECFAST_UNROLL
  for (int m = 0; m < M; m++) {
    const uint16_t* at = rows.row(x, m);
    if constexpr (P == 1) {
      add_pairs(acc[0][m], word[0], at);
    } else {
      const __m512i both = broadcast_word(reinterpret_cast<const int8_t*>(at));
      SPECFAST_UNROLL
      for (int i = 0; i < P; i++) add_pairs(acc[i][m], word[i], both);
    }
  }
}

template <int P, int M>
inline void store_sums(const Vec (&acc)[P][M], float* const* tile) {
  SPECFAST_UNROLL
  for (int i = 0; i < P; i++) {
    SPECFAST_UNROLL
    for (int m = 0; m < M; m++) store(tile[i] + m * kPanel, acc[i][m]);
  }
}

/// M rows times P packed panels.
template <int P, int M>
void packed_bf16(const Matrix* const* w, const int* n, Bf16Input in, float* const* tile) {
  const RowOffsets<M> rows(in.stride);
  const Fetch fetch;
  const __m512i* words[P];
  SPECFAST_UNROLL
  for (int i = 0; i < P; i++)
    words[i] =
        reinterpret_cast<const __m512i*>(w[i]->packed + static_cast<size_t>(n[i] / kPanel) * w[i]->panel_bytes());
  Vec acc[P][M];
  SPECFAST_UNROLL
  for (int i = 0; i < P; i++) {
    SPECFAST_UNROLL
    for (int m = 0; m < M; m++) acc[i][m] = zero();
  }
  for (int k = 0; k < w[0]->K; k += 2) {
    dot_bf16<P, M>(words, in.x + k, rows, acc);
    SPECFAST_UNROLL
    for (int i = 0; i < P; i++) fetch.line(reinterpret_cast<const uint8_t*>(words[i]++));
  }
  store_sums<P, M>(acc, tile);
}

/// M rows times the panel of w that starts at row n, read in place.
template <int M>
void bf16_in_place(const Matrix& w, int n, Bf16Input in, float* tile) {
  const RowOffsets<M> rows(in.stride);
  const uint8_t* weights[kPanel];
  for (int r = 0; r < kPanel; r++) weights[r] = panel_row(w, n, r);
  const uint8_t* next = weights[0] + 2 * kPanel * static_cast<size_t>(w.K);  // its panel is fetched, line by line
  Vec acc[1][M];
  SPECFAST_UNROLL
  for (int m = 0; m < M; m++) acc[0][m] = zero();
  for (int k = 0; k < w.K; k += kBf16Block) {
    alignas(64) __m512i block[kPanel];
    for (int r = 0; r < kPanel; r++) _mm_prefetch(next + 2 * kPanel * static_cast<size_t>(k) + 64 * r, _MM_HINT_T1);
    transpose_bf16(weights, w.K, k, block);
    const int count = smaller(kPanel, (w.K - k + 1) / 2);
    for (int j = 0; j < count; j++) dot_bf16<1, M>({block + j}, in.x + k + 2 * j, rows, acc);
  }
  store_sums<1, M>(acc, &tile);
}

template <int M>
void bf16_rows(const Matrix& a, int na, const Matrix& b, int nb, Bf16Input in, float* tile_a, float* tile_b) {
  const bool one = &a == &b && na == nb;
  if (a.packed && b.packed) {
    const Matrix* w[] = {&a, &b};
    const int n[] = {na, nb};
    float* tile[] = {tile_a, tile_b};
    return one ? packed_bf16<1, M>(w, n, in, tile) : packed_bf16<2, M>(w, n, in, tile);
  }
  bf16_in_place<M>(a, na, in, tile_a);
  if (!one) bf16_in_place<M>(b, nb, in, tile_b);
}

using Bf16RowsOf = void (*)(const Matrix&, int, const Matrix&, int, Bf16Input, float*, float*);

template <int... M>
Bf16RowsOf bf16_rows_of(int rows, std::integer_sequence<int, M...>) {
  static constexpr Bf16RowsOf kByRows[] = {bf16_rows<M + 1>...};
  return kByRows[rows - 1];
}

/// Two panels of bf16 weights of one K.
void bf16_panels(const Matrix& a, int na, const Matrix& b, int nb, const Rows& x, float* tile_a, float* tile_b) {
  const int first = x.M <= kBf16Rows ? x.M : (x.M + 1) / 2;
  for (int m = 0; m < x.M; m += first)
    bf16_rows_of(smaller(first, x.M - m), std::make_integer_sequence<int, kBf16Rows>())(
        a, na, b, nb, {x.bf16 + m * x.stride, x.stride}, tile_a + m * kPanel, tile_b + m * kPanel);
}

}  // namespace
