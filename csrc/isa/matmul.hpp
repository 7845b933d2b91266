// Matmul kernels written once over the vector primitives: lanes along K for floats, panels of 16 outputs for int8.
#pragma once

namespace {

constexpr int kWeightRows = 4;  // quantised weight rows that share each activation load

/// kWeightRows x MT dot products of dequantised weights along K; scales and biases are (groups, 16) floats of the
/// panel.
template <Format F, class X, int MT>
void float_block(const Matrix& w, const uint8_t* const* rows, const X* x, int64_t x_stride, const float* scales,
                 const float* biases, int first_row, float* tile) {
  Vec acc[kWeightRows][MT];
  SPECFAST_UNROLL
  for (int r = 0; r < kWeightRows; r++) {
    SPECFAST_UNROLL
    for (int m = 0; m < MT; m++) acc[r][m] = zero();
  }
  const int groups = w.K / w.group;
  for (int g = 0; g < groups; g++) {
    const float* s = scales + g * kPanel + first_row;
    const float* b = biases + g * kPanel + first_row;
    for (int k = g * w.group; k < (g + 1) * w.group; k += kLanes) {
      Vec in[MT];
      SPECFAST_UNROLL
      for (int m = 0; m < MT; m++) in[m] = load_x(x + m * x_stride + k);
      SPECFAST_UNROLL
      for (int r = 0; r < kWeightRows; r++) {
        const Vec q = F == Format::q4 ? load_q4(rows[r], k) : load_q8(rows[r], k);
        const Vec value = fma(broadcast(s[r]), q, broadcast(b[r]));
        SPECFAST_UNROLL
        for (int m = 0; m < MT; m++) acc[r][m] = fma(value, in[m], acc[r][m]);
      }
    }
  }
  SPECFAST_UNROLL
  for (int r = 0; r < kWeightRows; r++) {
    SPECFAST_UNROLL
    for (int m = 0; m < MT; m++) tile[m * kPanel + first_row + r] = sum(acc[r][m]);
  }
}

template <Format F, class X>
void float_panel(const Matrix& w, const X* x, int64_t x_stride, int M, int n, const float* scales, const float* biases,
                 float* tile) {
  for (int r = 0; r < kPanel; r += kWeightRows) {
    const uint8_t* rows[kWeightRows];
    SPECFAST_UNROLL
    for (int i = 0; i < kWeightRows; i++) rows[i] = panel_row(w, n, r + i);
    for (int m = 0; m < M; m += 4) {
      const X* in = x + m * x_stride;
      float* out = tile + m * kPanel;
      switch (smaller(4, M - m)) {
        case 1: float_block<F, X, 1>(w, rows, in, x_stride, scales, biases, r, out); break;
        case 2: float_block<F, X, 2>(w, rows, in, x_stride, scales, biases, r, out); break;
        case 3: float_block<F, X, 3>(w, rows, in, x_stride, scales, biases, r, out); break;
        default: float_block<F, X, 4>(w, rows, in, x_stride, scales, biases, r, out); break;
      }
    }
  }
}

/// How unquantised weights meet inputs, kStep of them at a time: widened to floats, fused multiply-adds.
template <Format F, class X>
struct FloatTerms {
  using Input = X;
  using Term = Vec;
  static constexpr int kStep = kLanes;

  static Vec weight(const uint8_t* row, int k) { return load_weight<F>(row, k); }
  static Vec weight_part(const uint8_t* row, int k, int n) { return load_weight_part<F>(row, k, n); }
  static Vec input(const X* x) { return load_x(x); }
  static Vec input_part(const X* x, int n) { return load_x_part(x, n); }
  static Vec add(Vec acc, Vec weight, Vec in) { return fma(weight, in, acc); }
};

constexpr int kChunkRows = 9;  // rows whose inputs of a chunk stay in the first-level cache

/// Inputs [k0, k1) of a panel.
template <class Terms>
struct Chunk {
  const Matrix& w;
  const typename Terms::Input* x;
  int64_t x_stride;
  int n, k0, k1;
  size_t ahead;  // bytes to where the same row's next inputs, or those of the next panel, lie
};

/// R weight rows and MT rows of x; their sums wait in `sums` (R, MT) between chunks and end in `tile`.
template <class Terms, int R, int MT>
void chunk_block(const Chunk<Terms>& chunk, int first_row, Vec* sums, float* tile) {
  const uint8_t* rows[R];
  Vec acc[R][MT];
  SPECFAST_UNROLL
  for (int r = 0; r < R; r++) {
    rows[r] = panel_row(chunk.w, chunk.n, first_row + r);
    SPECFAST_UNROLL
    for (int m = 0; m < MT; m++) acc[r][m] = chunk.k0 ? sums[r * MT + m] : zero();
  }
  const size_t element = chunk.w.row_bytes() / static_cast<size_t>(chunk.w.K);
  const auto step = [&](int k, auto weight_at, auto input_at) {
    typename Terms::Term weight[R];
    SPECFAST_UNROLL
    for (int r = 0; r < R; r++) {
      __builtin_prefetch(rows[r] + static_cast<size_t>(k) * element + chunk.ahead, 0, 2);
      weight[r] = weight_at(rows[r]);
    }
    SPECFAST_UNROLL
    for (int m = 0; m < MT; m++) {
      const typename Terms::Term in = input_at(chunk.x + m * chunk.x_stride + k);
      SPECFAST_UNROLL
      for (int r = 0; r < R; r++) acc[r][m] = Terms::add(acc[r][m], weight[r], in);
    }
  };
  using Input = typename Terms::Input;
  int k = chunk.k0;
  for (; k + Terms::kStep <= chunk.k1; k += Terms::kStep)
    step(k, [=](const uint8_t* row) { return Terms::weight(row, k); }, [](const Input* x) { return Terms::input(x); });
  if (const int n = chunk.k1 - k; n > 0)
    step(
        k, [=](const uint8_t* row) { return Terms::weight_part(row, k, n); },
        [=](const Input* x) { return Terms::input_part(x, n); });
  const bool last = chunk.k1 == chunk.w.K;
  SPECFAST_UNROLL
  for (int r = 0; r < R; r++) {
    SPECFAST_UNROLL
    for (int m = 0; m < MT; m++) {
      if (last) {
        tile[m * kPanel + first_row + r] = sum(acc[r][m]);
      } else {
        sums[r * MT + m] = acc[r][m];
      }
    }
  }
}

/// Weight rows read side by side: as many of 4 as leave all sums in registers.
constexpr int rows_beside(int MT) {
  return 4 * MT + 5 <= kRegisters ? 4 : 2 * MT + 3 <= kRegisters ? 2 : 1;
}

template <class Terms, int MT>
void chunk_blocks(const Chunk<Terms>& chunk, Vec* sums, float* tile) {
  constexpr int R = rows_beside(MT);
  for (int r = 0; r < kPanel; r += R) chunk_block<Terms, R, MT>(chunk, r, sums + r * MT, tile);
}

/// A panel of unquantised weights for at most kChunkRows rows.
template <class Terms>
void chunked_rows(const Matrix& w, const typename Terms::Input* x, int64_t x_stride, int M, int n, float* tile) {
  constexpr int kChunk = 2048 / static_cast<int>(sizeof(typename Terms::Input));
  Vec sums[kPanel * kChunkRows];
  for (int k0 = 0; k0 < w.K; k0 += kChunk) {
    const bool last = w.K - k0 <= kChunk;
    const size_t element = w.row_bytes() / static_cast<size_t>(w.K);
    const size_t ahead = last ? kPanel * w.row_bytes() - static_cast<size_t>(k0) * element : kChunk * element;
    const Chunk<Terms> chunk{w, x, x_stride, n, k0, last ? w.K : k0 + kChunk, ahead};
    switch (M) {
      case 1: chunk_blocks<Terms, 1>(chunk, sums, tile); break;
      case 2: chunk_blocks<Terms, 2>(chunk, sums, tile); break;
      case 3: chunk_blocks<Terms, 3>(chunk, sums, tile); break;
      case 4: chunk_blocks<Terms, 4>(chunk, sums, tile); break;
      case 5: chunk_blocks<Terms, 5>(chunk, sums, tile); break;
      case 6: chunk_blocks<Terms, 6>(chunk, sums, tile); break;
      case 7: chunk_blocks<Terms, 7>(chunk, sums, tile); break;
      case 8: chunk_blocks<Terms, 8>(chunk, sums, tile); break;
      default: chunk_blocks<Terms, 9>(chunk, sums, tile); break;
    }
  }
}

template <class Terms>
void chunked_panel(const Matrix& w, const typename Terms::Input* x, int64_t x_stride, int M, int n, float* tile) {
  const int first = M <= kChunkRows ? M : (M + 1) / 2;  // a second pass finds the panel in the cache
  chunked_rows<Terms>(w, x, x_stride, first, n, tile);
  if (first < M) chunked_rows<Terms>(w, x + first * x_stride, x_stride, M - first, n, tile + first * kPanel);
}

template <class X>
void float_panel_of(const Matrix& w, const X* x, int64_t x_stride, int M, int n, const float* s, const float* b,
                    float* tile) {
  switch (w.format) {
    case Format::q4: return float_panel<Format::q4>(w, x, x_stride, M, n, s, b, tile);
    case Format::q8: return float_panel<Format::q8>(w, x, x_stride, M, n, s, b, tile);
    case Format::bf16: return chunked_panel<FloatTerms<Format::bf16, X>>(w, x, x_stride, M, n, tile);
    case Format::f16: return chunked_panel<FloatTerms<Format::f16, X>>(w, x, x_stride, M, n, tile);
    default: return chunked_panel<FloatTerms<Format::f32, X>>(w, x, x_stride, M, n, tile);
  }
}

inline float* tile_of(const Matrix& w, float* scratch) {
  return scratch + panel_scale_floats(w.K);
}

/// The results of 16 outputs from n on, for all rows, into tile (M, 16).
void panel(const Matrix& stored, const Rows& x, Activation activation, int n, float* scratch, float* tile) {
  float* scales = scratch;
  float* biases = scratch + panel_scale_floats(stored.K) / 2;
  Matrix unpacked;
  if (stored.blocks != BlockType::none) {
    float* room = tile_of(stored, scratch) + 2 * kTileRows * kPanel;
    unpacked = unpack_panel(stored, n, reinterpret_cast<uint8_t*>(room), scales, biases);
    n = 0;
  } else if (is_quantised(stored.format) && !(stored.packed && activation == Activation::int8)) {
    transpose_scales(stored, stored.scales, n, scales);
    transpose_scales(stored, stored.biases, n, biases);
  }
  const Matrix& w = stored.blocks != BlockType::none ? unpacked : stored;
#if defined(SPECFAST_BF16_DOT)
  if (activation == Activation::bf16 && w.format == Format::bf16) return bf16_panels(w, n, w, n, x, tile, tile);
#endif
  switch (activation) {
    case Activation::int8: return int8_panel(w, x, n, scales, biases, tile);
    case Activation::bf16: return float_panel_of(w, x.bf16, x.stride, x.M, n, scales, biases, tile);
    case Activation::f32: return float_panel_of(w, x.f32, x.stride, x.M, n, scales, biases, tile);
  }
}

/// The same for panel `na` of a and panel `nb` of b, together where the instruction set has a kernel for two.
void panels(const Matrix& a, int na, Activation a_activation, const Matrix& b, int nb, Activation b_activation,
            const Rows& x, float* scratch, float* tile_a, float* tile_b) {
#if defined(SPECFAST_PANEL_PAIRS)
  const bool alike = a.format == b.format && a.group == b.group && a.scale_format == b.scale_format;
  if (alike && a_activation == b_activation) {
    if (a_activation == Activation::int8 && a.packed && b.packed) return int8_panels(a, na, b, nb, x, tile_a, tile_b);
    if (a_activation == Activation::bf16 && a.format == Format::bf16)
      return bf16_panels(a, na, b, nb, x, tile_a, tile_b);
  }
#endif
  panel(a, x, a_activation, na, scratch, tile_a);
  panel(b, x, b_activation, nb, scratch, tile_b);
}

void store_tile(const float* tile, int M, int columns, int n, float* y, int64_t ldy, const Epilogue& epilogue) {
  for (int m = 0; m < M; m++) {
    float* out = y + m * ldy + n;
    for (int i = 0; i < columns; i += kLanes) {
      const int part = smaller(kLanes, columns - i);
      Vec value = load(tile + m * kPanel + i);
      if (epilogue.bias) value = add(value, load_part(epilogue.bias + n + i, part));
      if (epilogue.accumulate) value = add(load_part(out + i, part), value);
      store_part(out + i, value, part);
    }
  }
}

void matmul_rows(const Matrix& w, const Rows& x, Activation activation, int n0, int n1, float* y, int64_t ldy,
                 const Epilogue& epilogue, float* scratch) {
  float* tile = tile_of(w, scratch);
  float* second = tile + kTileRows * kPanel;
  for (int n = n0; n < n1; n += 2 * kPanel) {
    const int left = n1 - n;
    if (left > kPanel) {
      panels(w, n, activation, w, n + kPanel, activation, x, scratch, tile, second);
      store_tile(second, x.M, smaller(kPanel, left - kPanel), n + kPanel, y, ldy, epilogue);
    } else {
      panel(w, x, activation, n, scratch, tile);
    }
    store_tile(tile, x.M, smaller(kPanel, left), n, y, ldy, epilogue);
  }
}

void swiglu_rows(const Matrix& gate, const Matrix& up, const Rows& x, Activation gate_activation,
                 Activation up_activation, int n0, int n1, float* h, int64_t ldh, float* scratch) {
  float* gate_tile = tile_of(gate, scratch);
  float* up_tile = gate_tile + kTileRows * kPanel;
  for (int n = n0; n < n1; n += kPanel) {
    panels(gate, n, gate_activation, up, n, up_activation, x, scratch, gate_tile, up_tile);
    const int columns = smaller(kPanel, n1 - n);
    for (int m = 0; m < x.M; m++) {
      for (int i = 0; i < columns; i += kLanes) {
        const Vec value = mul(silu(load(gate_tile + m * kPanel + i)), load(up_tile + m * kPanel + i));
        store_part(h + m * ldh + n + i, value, smaller(kLanes, columns - i));
      }
    }
  }
}

}  // namespace
