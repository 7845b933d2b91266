// Matmul kernels written once over the vector primitives: lanes along K for floats, panels of 16 outputs for int8.
#pragma once

namespace {

constexpr int kWeightRows = 4;  // weight rows that share each activation load

/// kWeightRows x MT dot products along K; scales and biases are (groups, 16) floats of the panel.
template <Format F, class X, int MT>
void float_block(const Matrix& w, const uint8_t* const* rows, const X* x, int64_t x_stride, const float* scales,
                 const float* biases, int first_row, float* tile) {
  Vec acc[kWeightRows][MT];
  SPECFAST_UNROLL
  for (int r = 0; r < kWeightRows; r++) {
    SPECFAST_UNROLL
    for (int m = 0; m < MT; m++) acc[r][m] = zero();
  }
  if constexpr (is_quantised(F)) {
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
  } else {
    int k = 0;
    for (; k + kLanes <= w.K; k += kLanes) {
      Vec in[MT];
      SPECFAST_UNROLL
      for (int m = 0; m < MT; m++) in[m] = load_x(x + m * x_stride + k);
      SPECFAST_UNROLL
      for (int r = 0; r < kWeightRows; r++) {
        const Vec value = load_weight<F>(rows[r], k);
        SPECFAST_UNROLL
        for (int m = 0; m < MT; m++) acc[r][m] = fma(value, in[m], acc[r][m]);
      }
    }
    if (k < w.K) {
      const int part = w.K - k;
      SPECFAST_UNROLL
      for (int r = 0; r < kWeightRows; r++) {
        const Vec value = load_weight_part<F>(rows[r], k, part);
        SPECFAST_UNROLL
        for (int m = 0; m < MT; m++) acc[r][m] = fma(value, load_x_part(x + m * x_stride + k, part), acc[r][m]);
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

#if defined(SPECFAST_BF16_DOT)
constexpr int kChunk = 1024;  // inputs a panel takes at a time: those of 9 rows stay in the first-level cache
constexpr int kChunkRows = 9;

/// Inputs [k0, k1) of a panel with the CPU's bf16 dot instruction: both operands bf16, 32 inputs a step.
struct Bf16Chunk {
  const Matrix& w;
  const uint16_t* x;
  int64_t x_stride;
  int n, k0, k1;
  size_t ahead;  // bytes to where the same row's next inputs, or those of the next panel, lie
};

/// R weight rows and MT rows of x; their sums wait in `sums` (R, MT) between chunks and end in `tile`.
template <int R, int MT>
void bf16_block(const Bf16Chunk& chunk, int first_row, Vec* sums, float* tile) {
  const uint8_t* rows[R];
  Vec acc[R][MT];
  SPECFAST_UNROLL
  for (int r = 0; r < R; r++) {
    rows[r] = panel_row(chunk.w, chunk.n, first_row + r);
    SPECFAST_UNROLL
    for (int m = 0; m < MT; m++) acc[r][m] = chunk.k0 ? sums[r * MT + m] : zero();
  }
  const auto step = [&](int k, auto load_pairs) {
    Pairs weight[R];
    SPECFAST_UNROLL
    for (int r = 0; r < R; r++) {
      const uint16_t* row = reinterpret_cast<const uint16_t*>(rows[r]) + k;
      fetch(reinterpret_cast<const uint8_t*>(row) + chunk.ahead);
      weight[r] = load_pairs(row);
    }
    SPECFAST_UNROLL
    for (int m = 0; m < MT; m++) {
      const Pairs in = load_pairs(chunk.x + m * chunk.x_stride + k);
      SPECFAST_UNROLL
      for (int r = 0; r < R; r++) acc[r][m] = dot_pairs(acc[r][m], weight[r], in);
    }
  };
  int k = chunk.k0;
  for (; k + 2 * kLanes <= chunk.k1; k += 2 * kLanes) step(k, [](const uint16_t* p) { return load_pairs(p); });
  if (k < chunk.k1) step(k, [part = chunk.k1 - k](const uint16_t* p) { return load_pairs_part(p, part); });
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

template <int R, int MT>
void bf16_blocks(const Bf16Chunk& chunk, Vec* sums, float* tile) {
  for (int r = 0; r < kPanel; r += R) bf16_block<R, MT>(chunk, r, sums + r * MT, tile);
}

/// A panel for at most kChunkRows rows: the fewer, the more weight rows are read side by side.
void bf16_panel_of(const Matrix& w, const uint16_t* x, int64_t x_stride, int M, int n, float* tile) {
  Vec sums[kPanel * kChunkRows];
  for (int k0 = 0; k0 < w.K; k0 += kChunk) {
    const bool last = w.K - k0 <= kChunk;
    const size_t ahead = last ? kPanel * w.row_bytes() - 2 * static_cast<size_t>(k0) : 2 * kChunk;
    const Bf16Chunk chunk{w, x, x_stride, n, k0, last ? w.K : k0 + kChunk, ahead};
    switch (M) {
      case 1: bf16_blocks<4, 1>(chunk, sums, tile); break;
      case 2: bf16_blocks<4, 2>(chunk, sums, tile); break;
      case 3: bf16_blocks<4, 3>(chunk, sums, tile); break;
      case 4: bf16_blocks<4, 4>(chunk, sums, tile); break;
      case 5: bf16_blocks<4, 5>(chunk, sums, tile); break;
      case 6: bf16_blocks<4, 6>(chunk, sums, tile); break;
      case 7: bf16_blocks<2, 7>(chunk, sums, tile); break;
      case 8: bf16_blocks<2, 8>(chunk, sums, tile); break;
      default: bf16_blocks<2, 9>(chunk, sums, tile); break;
    }
  }
}

void bf16_panel(const Matrix& w, const uint16_t* x, int64_t x_stride, int M, int n, float* tile) {
  const int first = M <= kChunkRows ? M : (M + 1) / 2;  // a second pass finds the panel in the cache
  bf16_panel_of(w, x, x_stride, first, n, tile);
  if (first < M) bf16_panel_of(w, x + first * x_stride, x_stride, M - first, n, tile + first * kPanel);
}

void bf16_panel(const Matrix& w, const float* x, int64_t x_stride, int M, int n, float* tile) {
  float_panel<Format::bf16>(w, x, x_stride, M, n, nullptr, nullptr, tile);
}
#else
template <class X>
void bf16_panel(const Matrix& w, const X* x, int64_t x_stride, int M, int n, float* tile) {
  float_panel<Format::bf16>(w, x, x_stride, M, n, nullptr, nullptr, tile);
}
#endif

template <class X>
void float_panel_of(const Matrix& w, const X* x, int64_t x_stride, int M, int n, const float* s, const float* b,
                    float* tile) {
  switch (w.format) {
    case Format::q4: return float_panel<Format::q4>(w, x, x_stride, M, n, s, b, tile);
    case Format::q8: return float_panel<Format::q8>(w, x, x_stride, M, n, s, b, tile);
    case Format::bf16: return bf16_panel(w, x, x_stride, M, n, tile);
    case Format::f16: return float_panel<Format::f16>(w, x, x_stride, M, n, s, b, tile);
    default: return float_panel<Format::f32>(w, x, x_stride, M, n, s, b, tile);
  }
}

/// The results of 16 outputs from n on, for all rows, into tile (M, 16).
void panel(const Matrix& w, const Rows& x, Activation activation, int n, float* scratch, float* tile) {
  float* scales = scratch;
  float* biases = scratch + (static_cast<size_t>(w.K) / 32 + 2) * kPanel;
  if (is_quantised(w.format) && !(w.packed && activation == Activation::int8)) {
    transpose_scales(w, w.scales, n, scales);
    transpose_scales(w, w.biases, n, biases);
  }
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
  if (a.packed && b.packed && alike && a_activation == Activation::int8 && b_activation == Activation::int8)
    return int8_panels(a, na, b, nb, x, tile_a, tile_b);
#endif
  panel(a, x, a_activation, na, scratch, tile_a);
  panel(b, x, b_activation, nb, scratch, tile_b);
}

inline float* tile_of(const Matrix& w, float* scratch) {
  return scratch + 2 * (static_cast<size_t>(w.K) / 32 + 2) * kPanel;
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
