// Norms and activation forms of a region's input.
#include "rows_buffer.hpp"

#include <cmath>

namespace specfast {

Activation activation_of(const Matrix& w, Precision precision) {
  if (precision == Precision::f32 || w.format == Format::f32) return Activation::f32;
  if (is_quantised(w.format) && precision == Precision::int8) return Activation::int8;
  return Activation::bf16;
}

Needs needs_of(std::initializer_list<const Matrix*> matrices, Precision precision) {
  Needs needs;
  for (const Matrix* w : matrices) {
    const Activation activation = activation_of(*w, precision);
    if (activation == Activation::int8) needs.int8[int8_layout(w->format, w->group)] = true;
    if (activation == Activation::bf16) needs.bf16 = true;
  }
  return needs;
}

RowsBuffer::RowsBuffer(int32_t K)
    : stride_((K + 63) / 64 * 64 + 32), K_(K), f32_(static_cast<size_t>(kTileRows) * static_cast<size_t>(stride_)) {}

void RowsBuffer::reserve(const Needs& needs) {
  if (needs.bf16) bf16_.resize(f32_.size());
  for (int i = 0; i < kInt8Layouts; i++) {
    if (!needs.int8[i]) continue;
    const size_t blocks = f32_.size() / static_cast<size_t>(block_of(static_cast<Int8Layout>(i)));
    q_[i].resize(f32_.size());
    scale_[i].resize(blocks);
    scaled_sum_[i].resize(blocks);
    sum_[i].resize(blocks);
  }
}

Rows RowsBuffer::view(int32_t M) {
  Rows rows;
  rows.M = M;
  rows.K = K_;
  rows.stride = stride_;
  rows.f32 = f32_.data();
  rows.bf16 = bf16_.data();
  for (int i = 0; i < kInt8Layouts; i++)
    rows.int8[i] = {q_[i].data(), scale_[i].data(), scaled_sum_[i].data(), sum_[i].data()};
  return rows;
}

namespace {

void prepare_columns(const KernelTable& kernels, const Rows& rows, const Needs& needs, int k0, int k1) {
  if (k0 >= k1) return;
  if (needs.bf16) kernels.round_bf16(rows, k0, k1);
  for (int i = 0; i < kInt8Layouts; i++) {
    if (needs.int8[i]) kernels.quantise_int8(rows, static_cast<Int8Layout>(i), k0, k1);
  }
}

}  // namespace

void prepare_rows(const Team& team, const KernelTable& kernels, const Rows& rows, const Needs& needs) {
  int k0, k1;
  team.part(rows.K, 64, &k0, &k1);
  prepare_columns(kernels, rows, needs, k0, k1);
}

void normalise_rows(const Team& team, const KernelTable& kernels, const float* x, int64_t ldx, const float* weight,
                    float eps, const Rows& rows, const Needs& needs) {
  int k0, k1;
  team.part(rows.K, 64, &k0, &k1);
  if (k0 >= k1) return;
  for (int m = 0; m < rows.M; m++) {
    const float* row = x + m * ldx;
    const float inv = 1.0f / std::sqrt(kernels.sum_squares(row, rows.K) / static_cast<float>(rows.K) + eps);
    kernels.scale_row(row + k0, weight + k0, inv, rows.f32 + static_cast<size_t>(m) * rows.stride + k0, k1 - k0);
  }
  prepare_columns(kernels, rows, needs, k0, k1);
}

}  // namespace specfast
