// Norm, QKV projection, bias or QK-norm, RoPE, and the provisional append to the KV cache.
#include <algorithm>
#include <cmath>

#include "regions.hpp"

namespace specfast {
namespace {

void norm_head(const KernelTable& kernels, const std::vector<float>& weight, float eps, float* head) {
  if (weight.empty()) return;
  const int n = static_cast<int>(weight.size());
  const float inv = 1.0f / std::sqrt(kernels.sum_squares(head, n) / static_cast<float>(n) + eps);
  kernels.scale_row(head, weight.data(), inv, head, n);
}

/// Puts the even elements of a head before its odd ones, where rope_head finds the pairs. Scores do not depend on it.
void split_pairs(float* head, int n) {
  float odd[kMaxHeadDim / 2];
  for (int i = 0; i < n / 2; i++) {
    odd[i] = head[2 * i + 1];
    head[i] = head[2 * i];
  }
  std::copy_n(odd, n / 2, head + n / 2);
}

}  // namespace

void rope_angles(const Pass& pass) {
  const std::vector<float>& inv_freq = pass.model.rope_inv_freq;
  for (int32_t m = pass.team.id; m < pass.tile.M; m += pass.team.size) {
    float* cosines = pass.work.angles.data() + m * pass.model.head_dim;
    float* sines = cosines + inv_freq.size();
    for (size_t d = 0; d < inv_freq.size(); d++) {
      const float angle = static_cast<float>(pass.tile.position + m) * inv_freq[d];
      cosines[d] = static_cast<float>(std::cos(static_cast<double>(angle)));
      sines[d] = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
  }
}

void qkv_rope_append(const Pass& pass, int layer) {
  const Model& model = pass.model;
  const LayerWeights& w = model.layers[static_cast<size_t>(layer)];
  const KernelTable& kernels = pass.kernels();
  const Needs needs = needs_of({&w.q, &w.k, &w.v}, model.precision);
  const Rows rows = pass.work.normed.view(pass.tile.M);
  normalise_rows(pass.team, kernels, pass.x(), model.hidden, w.input_norm.data(), model.rms_eps, rows, needs);
  pass.team.barrier();

  float* qkv = pass.work.qkv.data();
  const int32_t columns = model.qkv_columns();
  int32_t first_column = 0;
  const std::pair<const Matrix*, const std::vector<float>*> parts[] = {
      {&w.q, &w.q_bias}, {&w.k, &w.k_bias}, {&w.v, &w.v_bias}};
  for (const auto& [matrix, bias] : parts) {
    int n0, n1;
    pass.team.part(matrix->N, kPanel, &n0, &n1);
    Epilogue epilogue;
    if (!bias->empty()) epilogue.bias = bias->data();
    kernels.matmul_rows(*matrix, rows, activation_of(*matrix, model.precision), n0, n1, qkv + first_column, columns,
                        epilogue, pass.scratch());
    first_column += matrix->N;
  }
  pass.team.barrier();

  const int32_t rotated = model.heads + model.kv_heads;
  for (int32_t i = pass.team.id; i < pass.tile.M * rotated; i += pass.team.size) {
    const int32_t m = i / rotated, head = i % rotated;
    const int64_t position = pass.tile.position + m;
    float* row = qkv + static_cast<size_t>(m) * columns;
    float* x = row + head * model.head_dim;
    if (model.rope_pairs) split_pairs(x, model.head_dim);
    norm_head(kernels, head < model.heads ? w.q_norm : w.k_norm, model.rms_eps, x);
    const float* cosines = pass.work.angles.data() + m * model.head_dim;
    kernels.rope_head(x, cosines, cosines + model.head_dim / 2, model.head_dim);
    if (head < model.heads) continue;
    const int32_t kv_head = head - model.heads;
    const float* v = row + model.q_columns() + model.kv_columns() + kv_head * model.head_dim;
    const KvPage page = pass.cache.page(position / kPagePositions, layer, kv_head);
    kernels.append_head(page, x, v, model.head_dim, pass.cache.shape().padded_dim(),
                        static_cast<int>(position % kPagePositions));
  }
  pass.team.barrier();
}

}  // namespace specfast
