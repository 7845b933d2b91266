// The contract an instruction set fills: one table of kernels, chosen once at load.
#pragma once

#include "law_loops.hpp"
#include "types.hpp"

namespace specfast {

/// What build_info() says about one kernel. Names are <stem>_<weights>_<activations>_<tile>_<isa>.
struct KernelInfo {
  const char* stem;
  const char* name;
};

/// Kernels of one instruction set. None allocates, throws or starts threads; all results for a row are the same bits
/// for every M and for every way of cutting [n0, n1) or [k0, k1) into multiples of 16 or 64.
struct KernelTable {
  const char* isa;
  const char* features;  // what the CPU must have, for messages
  const KernelInfo* infos;
  int infos_count;

  /// Returns sum(x[i]^2) over n floats.
  float (*sum_squares)(const float* x, int n);
  /// Writes out[i] = x[i] * inv * weight[i].
  void (*scale_row)(const float* x, const float* weight, float inv, float* out, int n);
  /// Rounds f32 rows to bf16 for columns [k0, k1).
  void (*round_bf16)(const Rows& rows, int k0, int k1);
  /// Quantises f32 rows to int8 for columns [k0, k1), multiples of 64 (k1 may be K). A NaN input makes its scale NaN.
  void (*quantise_int8)(const Rows& rows, Int8Layout layout, int k0, int k1);

  /// y[m * ldy + n] = sum_k x[m, k] w[n, k] for n in [n0, n1), n0 a multiple of 16.
  /// `scratch` holds matmul_scratch_floats(K) floats.
  void (*matmul_rows)(const Matrix& w, const Rows& x, Activation activation, int n0, int n1, float* y, int64_t ldy,
                      const Epilogue& epilogue, float* scratch);
  /// Writes packed panel n / 16 of a quantised or bf16 matrix (see Matrix::packed); null if this table reads rows in
  /// place only.
  void (*pack_panel)(const Matrix& w, int n, uint8_t* out);
  /// h[m * ldh + n] = silu(gate(x))[n] * up(x)[n] for n in [n0, n1).
  void (*swiglu_rows)(const Matrix& gate, const Matrix& up, const Rows& x, Activation gate_activation,
                      Activation up_activation, int n0, int n1, float* h, int64_t ldh, float* scratch);

  /// Rotates one head in place: pairs (i, i + head_dim / 2) by the angle whose cos and sin are given.
  void (*rope_head)(float* x, const float* cos, const float* sin, int head_dim);
  /// Stores one head's key and value at `position` (0..255) of a page.
  void (*append_head)(const KvPage& page, const float* k, const float* v, int head_dim, int padded_dim, int position);
  /// Adds one page to softmax statistics and weighted values; see AttendPage.
  void (*attend_rows)(const AttendPage& args);
  /// Merges the partial results of `spans` (stride floats apart) in position order into out (head_dim,).
  void (*merge_spans)(const float* partial, int64_t stride, int spans, float* out, int head_dim);

  /// Folds n logits whose first id is `first` into the running maximum; ties keep the lowest id.
  void (*logits_rows)(const float* logits, int n, int first, RowMax* best);
  /// Loops over rows of logits and laws.
  LawLoops law;
  /// Writes row `row` of an embedding matrix as floats (K,).
  void (*embed_row)(const Matrix& w, int row, float* out);

  /// Reads `bytes` (a multiple of 64) and returns a value that depends on all of them.
  uint32_t (*read_bytes)(const void* data, size_t bytes);
  /// Runs the dot instruction of an activation form `iterations` times on registers; returns multiply-adds done.
  uint64_t (*peak_dot)(Activation activation, uint64_t iterations);
};

/// Floats of a panel's scales and biases, transposed.
constexpr size_t panel_scale_floats(int K) {
  return 2 * (static_cast<size_t>(K) / 32 + 2) * kPanel;
}
/// Floats of scratch a matmul needs: scales and biases, two panels of results, and a panel of unpacked blocks.
constexpr size_t matmul_scratch_floats(int K) {
  return panel_scale_floats(K) + 2 * kTileRows * kPanel + static_cast<size_t>(K) * kPanel;
}

const KernelTable& scalar_kernels();
#if defined(SPECFAST_HAS_AVX2)
const KernelTable& avx2_kernels();
#endif
#if defined(SPECFAST_HAS_AVX_VNNI)
const KernelTable& avx_vnni_kernels();
#endif
#if defined(SPECFAST_HAS_AVX512)
const KernelTable& avx512_kernels();
#endif
#if defined(SPECFAST_HAS_NEON)
const KernelTable& neon_kernels();
#endif
#if defined(SPECFAST_HAS_NEON_I8MM)
const KernelTable& neon_i8mm_kernels();
#endif

}  // namespace specfast
