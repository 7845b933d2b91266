// What one forward pass writes besides the KV cache: buffers of up to 16 rows, owned by a sequence.
#pragma once

#include <algorithm>
#include <vector>

#include "model.hpp"
#include "verify_logits.hpp"

namespace specfast {

struct Workspace {
  explicit Workspace(const Model& model)
      : x(rows_of(model.hidden)),
        normed(model.hidden),
        qkv(rows_of(model.qkv_columns())),
        angles(rows_of(model.head_dim)),
        attended(model.q_columns()),
        activated(model.intermediate) {
    for (const LayerWeights& w : model.layers) {
      normed.reserve(needs_of({&w.q, &w.k, &w.v, &w.gate, &w.up}, model.precision));
      attended.reserve(needs_of({&w.o}, model.precision));
      activated.reserve(needs_of({&w.down}, model.precision));
    }
    if (model.last()) normed.reserve(needs_of({&model.head}, model.precision));
  }

  /// Makes room for the threads of one call, with at least `floats` of scratch each.
  void reserve(const Model& model, int threads, size_t floats = 0) {
    const int32_t widest = std::max({model.hidden, model.intermediate, model.q_columns()});
    floats = std::max(floats, matmul_scratch_floats(widest));
    scratch.resize(static_cast<size_t>(threads) * ((floats + 15) / 16 * 16 + 16));
    best.resize(static_cast<size_t>(threads) * kTileRows);
  }

  static size_t rows_of(int32_t columns) { return static_cast<size_t>(kTileRows) * static_cast<size_t>(columns); }

  std::vector<float> x;        // (16, hidden): the residual stream
  RowsBuffer normed;           // input of qkv, of gate and up, and of the head
  std::vector<float> qkv;      // (16, qkv columns)
  std::vector<float> angles;   // (16, head_dim): of RoPE, cosines then sines
  std::vector<float> partial;  // (spans, M, heads, padded_dim + 2)
  RowsBuffer attended;         // input of o
  RowsBuffer activated;        // input of down
  std::vector<float> scratch;  // per thread, for matmuls and pages of affine codes
  std::vector<float> logits;   // (rows, vocab)
  std::vector<RowMax> best;    // (threads, 16), then reduced into the first row
  VerifyScratch verify;
};

/// One tile's place in a forward pass, shared by all its regions.
struct Tile {
  const int32_t* tokens = nullptr;  // (M,); null where x holds the rows already
  int32_t M = 0;
  int64_t position = 0;  // of row 0
  int32_t first_layer = 0;
  int32_t last_layer = 0;  // the first that is not run
  float* x = nullptr;      // (M, hidden): the residual stream, where it is not the workspace's
};

}  // namespace specfast
