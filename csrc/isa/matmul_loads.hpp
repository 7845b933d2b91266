// How matmul kernels find weight rows and read activations and unquantised weights.
#pragma once

namespace {

/// Row n + i of a panel, clamped to the last row so that a ragged panel reads valid memory.
inline const uint8_t* panel_row(const Matrix& w, int n, int i) {
  return static_cast<const uint8_t*>(w.weight) + static_cast<size_t>(smaller(n + i, w.N - 1)) * w.row_bytes();
}

inline Vec load_x(const float* p) {
  return load(p);
}
inline Vec load_x(const uint16_t* p) {
  return load_bf16(p);
}
inline Vec load_x_part(const float* p, int n) {
  return load_part(p, n);
}
inline Vec load_x_part(const uint16_t* p, int n) {
  return load_bf16_part(p, n);
}

template <Format F>
inline Vec load_weight_part(const uint8_t* row, int k, int n) {
  if constexpr (F == Format::bf16) return load_bf16_part(reinterpret_cast<const uint16_t*>(row) + k, n);
  if constexpr (F == Format::f16) return load_f16_part(reinterpret_cast<const uint16_t*>(row) + k, n);
  if constexpr (F == Format::f32) return load_part(reinterpret_cast<const float*>(row) + k, n);
}

template <Format F>
inline Vec load_weight(const uint8_t* row, int k) {
  if constexpr (F == Format::bf16) return load_bf16(reinterpret_cast<const uint16_t*>(row) + k);
  if constexpr (F == Format::f16) return load_f16(reinterpret_cast<const uint16_t*>(row) + k);
  if constexpr (F == Format::f32) return load(reinterpret_cast<const float*>(row) + k);
}

}  // namespace
