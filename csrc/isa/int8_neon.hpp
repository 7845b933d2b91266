// The int8 panel of the NEON tables around block_dots(): 8 outputs at a time, rows in passes.
#pragma once

namespace {

constexpr int kPassRows = 10;  // the sums of so many rows and the weights of four outputs fit the registers

/// Element m of p in all lanes; `fours` holds the first MT / 4 vectors of p.
template <int MT>
inline Vec broadcast_row(const float* p, const Vec* fours, int m) {
  return broadcast(m < MT / 4 * 4 ? fours[m / 4][m % 4] : p[m]);
}

/// 4 R outputs for rows m0 .. m0 + MT - 1. A block is added in two steps, bias first, then scale, each fused.
template <int BITS, int BLOCK, int R, int MT>
[[gnu::noinline]] void int8_quads(const Matrix& w, const uint8_t* const* rows, const Int8Rows& x, int M, int m0,
                                  const float* scales, const float* biases, float* tile) {
  const int groups = static_cast<int>(w.groups()), group_blocks = w.group / BLOCK;
  size_t offset = 0, at = static_cast<size_t>(m0);
  Vec acc[R][MT];
  SPECFAST_UNROLL
  for (int r = 0; r < R; r++) {
    SPECFAST_UNROLL
    for (int m = 0; m < MT; m++) acc[r][m] = zero();
  }
  for (int g = 0; g < groups; g++) {
    for (int h = 0; h < group_blocks; h++) {
      int32x4_t dots[R][MT];
      block_dots<BITS, BLOCK, R, MT>(rows, offset, x.q + at * BLOCK, x.sum + at, dots);
      const float *scale = x.scale + at, *scaled_sum = x.scaled_sum + at;
      Vec scales_of[MT / 4 + 1], sums_of[MT / 4 + 1];
      SPECFAST_UNROLL
      for (int i = 0; i < MT / 4; i++) {
        scales_of[i] = load(scale + 4 * i);
        sums_of[i] = load(scaled_sum + 4 * i);
      }
      SPECFAST_UNROLL
      for (int r = 0; r < R; r++) {
        const Vec s = load(scales + g * kPanel + 4 * r), bias = load(biases + g * kPanel + 4 * r);
        SPECFAST_UNROLL
        for (int m = 0; m < MT; m++) {
          acc[r][m] = fma(bias, broadcast_row<MT>(scaled_sum, sums_of, m), acc[r][m]);
          acc[r][m] = fma(vcvtq_f32_s32(dots[r][m]), mul(s, broadcast_row<MT>(scale, scales_of, m)), acc[r][m]);
        }
      }
      offset += BLOCK * BITS / 8;
      at += static_cast<size_t>(M);
    }
  }
  SPECFAST_UNROLL
  for (int r = 0; r < R; r++) {
    SPECFAST_UNROLL
    for (int m = 0; m < MT; m++) store(tile + (m0 + m) * kPanel + 4 * r, acc[r][m]);
  }
}

/// 8 outputs: the sums of up to 4 rows fit the registers for all of them, those of more rows for half of them.
template <int BITS, int BLOCK, int MT>
void int8_rows(const Matrix& w, const uint8_t* const* rows, const Int8Rows& x, int M, int m0, const float* scales,
               const float* biases, float* tile) {
  constexpr int R = MT <= 4 ? 2 : 1;
  for (int r = 0; r < 8; r += 4 * R)
    int8_quads<BITS, BLOCK, R, MT>(w, rows + r, x, M, m0, scales + r, biases + r, tile + r);
}

template <int BITS, int BLOCK>
void int8_panel_of(const Matrix& w, const Int8Rows& x, int M, int n, const float* scales, const float* biases,
                   float* tile) {
  for (int r = 0; r < kPanel; r += 8) {
    const uint8_t* rows[8];
    for (int i = 0; i < 8; i++) rows[i] = panel_row(w, n, r + i);
    const float *s = scales + r, *b = biases + r;
    for (int m = 0, count; m < M; m += count) {
      count = M - m <= kPassRows ? M - m : 8;
      switch (count) {
        case 1: int8_rows<BITS, BLOCK, 1>(w, rows, x, M, m, s, b, tile + r); break;
        case 2: int8_rows<BITS, BLOCK, 2>(w, rows, x, M, m, s, b, tile + r); break;
        case 3: int8_rows<BITS, BLOCK, 3>(w, rows, x, M, m, s, b, tile + r); break;
        case 4: int8_rows<BITS, BLOCK, 4>(w, rows, x, M, m, s, b, tile + r); break;
        case 5: int8_rows<BITS, BLOCK, 5>(w, rows, x, M, m, s, b, tile + r); break;
        case 6: int8_rows<BITS, BLOCK, 6>(w, rows, x, M, m, s, b, tile + r); break;
        case 7: int8_rows<BITS, BLOCK, 7>(w, rows, x, M, m, s, b, tile + r); break;
        case 8: int8_rows<BITS, BLOCK, 8>(w, rows, x, M, m, s, b, tile + r); break;
        case 9: int8_rows<BITS, BLOCK, 9>(w, rows, x, M, m, s, b, tile + r); break;
        default: int8_rows<BITS, BLOCK, 10>(w, rows, x, M, m, s, b, tile + r); break;
      }
    }
  }
}

void int8_panel(const Matrix& w, const Rows& x, int n, const float* scales, const float* biases, float* tile) {
  const Int8Layout layout = int8_layout(w.format, w.group);
  switch (layout) {
    case kQ4Block32: return int8_panel_of<4, 32>(w, x.int8[layout], x.M, n, scales, biases, tile);
    case kQ4Block64: return int8_panel_of<4, 64>(w, x.int8[layout], x.M, n, scales, biases, tile);
    case kQ8Block32: return int8_panel_of<8, 32>(w, x.int8[layout], x.M, n, scales, biases, tile);
    default: return int8_panel_of<8, 64>(w, x.int8[layout], x.M, n, scales, biases, tile);
  }
}

}  // namespace
