// The rows one region feeds to its matrices, in every activation form these read.
#pragma once

#include <initializer_list>
#include <memory>
#include <vector>

#include "kernels.hpp"
#include "thread_pool.hpp"

namespace specfast {

enum class Precision : uint8_t { int8, bf16, f32 };

/// The form a matrix is multiplied with: int8 for quantised weights, bf16 for 16-bit ones, unless f32 is asked for.
Activation activation_of(const Matrix& w, Precision precision);

/// The forms a set of matrices reads.
struct Needs {
  bool bf16 = false;
  bool int8[kInt8Layouts] = {};
};
Needs needs_of(std::initializer_list<const Matrix*> matrices, Precision precision);

/// Owns the buffers of up to 16 rows of K inputs.
class RowsBuffer {
 public:
  explicit RowsBuffer(int32_t K);

  /// Makes room for the forms in `needs`. Not for use by a team: its threads only take views.
  void reserve(const Needs& needs);

  /// The first M rows, in every form there is room for.
  Rows view(int32_t M);

 private:
  int32_t stride_;
  int32_t K_;
  std::vector<float> f32_;
  std::vector<uint16_t> bf16_;
  std::vector<int8_t> q_[kInt8Layouts];
  std::vector<float> scale_[kInt8Layouts], scaled_sum_[kInt8Layouts];
  std::vector<int32_t> sum_[kInt8Layouts];
};

/// Fills the other forms of the f32 rows for this thread's part of the columns (cut at multiples of 64).
void prepare_rows(const Team& team, const KernelTable& kernels, const Rows& rows, const Needs& needs);

/// rows.f32 = RMSNorm(x) * weight, then prepare_rows, for this thread's part of the columns. x: (M, K), `ldx` apart.
void normalise_rows(const Team& team, const KernelTable& kernels, const float* x, int64_t ldx, const float* weight,
                    float eps, const Rows& rows, const Needs& needs);

}  // namespace specfast
