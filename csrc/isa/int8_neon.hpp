// The int8 panel of the NEON tables: 8 outputs at a time, rows of activations in passes of up to 8.
#pragma once

namespace {

template <int BITS, int BLOCK>
void int8_panel_of(const Matrix& w, const Int8Rows& x, int M, int n, const float* scales, const float* biases,
                   float* tile) {
  for (int r = 0; r < kPanel; r += 8) {
    const uint8_t* rows[8];
    for (int i = 0; i < 8; i++) rows[i] = panel_row(w, n, r + i);
    const float *s = scales + r, *b = biases + r;
    for (int m = 0; m < M; m += 8) {
      switch (smaller(8, M - m)) {
        case 1: int8_rows<BITS, BLOCK, 1>(w, rows, x, M, m, s, b, tile + r); break;
        case 2: int8_rows<BITS, BLOCK, 2>(w, rows, x, M, m, s, b, tile + r); break;
        case 3: int8_rows<BITS, BLOCK, 3>(w, rows, x, M, m, s, b, tile + r); break;
        case 4: int8_rows<BITS, BLOCK, 4>(w, rows, x, M, m, s, b, tile + r); break;
        case 5: int8_rows<BITS, BLOCK, 5>(w, rows, x, M, m, s, b, tile + r); break;
        case 6: int8_rows<BITS, BLOCK, 6>(w, rows, x, M, m, s, b, tile + r); break;
        case 7: int8_rows<BITS, BLOCK, 7>(w, rows, x, M, m, s, b, tile + r); break;
        default: int8_rows<BITS, BLOCK, 8>(w, rows, x, M, m, s, b, tile + r); break;
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
