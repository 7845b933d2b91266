// A decoder's shape and weights, or those of a range of its layers: immutable, shared by all sequences.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "rows_buffer.hpp"

namespace specfast {

struct LayerWeights {
  Matrix q, k, v, o, gate, up, down;
  std::vector<float> input_norm, post_norm;   // (hidden,)
  std::vector<float> q_bias, k_bias, v_bias;  // (N,) or empty
  std::vector<float> q_norm, k_norm;          // (head_dim,) or empty
  int64_t window = 0;                         // positions a row attends to, its own included; 0: all
};

struct Model {
  int32_t hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, intermediate = 0, vocab = 0;
  float rms_eps = 1e-5f;
  int64_t max_context = 0;
  std::vector<float> rope_inv_freq;  // (head_dim / 2,)
  bool rope_pairs = false;           // RoPE turns inputs (2 i, 2 i + 1) of q and k instead of (i, i + head_dim / 2)
  Matrix embed, head;                // the same matrix when tied; embed is empty unless first(), head unless last()
  std::vector<float> norm;           // (hidden,), empty unless last()
  std::vector<LayerWeights> layers;  // of the range
  Precision precision = Precision::int8;
  KvFormat kv_format = KvFormat::bf16;
  const KernelTable* kernels = nullptr;

  /// Whether it begins with token ids; else with the residual stream of the layer before.
  bool first() const { return embed.N > 0; }
  /// Whether it ends with logits; else with the residual stream.
  bool last() const { return !norm.empty(); }
  int32_t group() const { return heads / kv_heads; }
  int32_t q_columns() const { return heads * head_dim; }
  int32_t kv_columns() const { return kv_heads * head_dim; }
  int32_t qkv_columns() const { return q_columns() + 2 * kv_columns(); }
  float attention_scale() const;
  KvShape kv_shape() const { return {static_cast<int32_t>(layers.size()), kv_heads, head_dim, kv_format}; }
  /// Of each layer.
  std::vector<Window> windows() const;
  /// Bytes of weights one forward pass streams, the head included.
  size_t pass_bytes() const { return pass_bytes(static_cast<int>(layers.size())); }
  /// The same for a pass over the first `first_layers` layers.
  size_t pass_bytes(int first_layers) const;
  /// Whether a pass is over before a second thread would have helped much.
  bool is_small() const { return pass_bytes() < (size_t{16} << 20); }
  /// Multiply-adds of the matmuls of one row.
  double row_macs() const;
  /// Throws ShapeError when a matrix or vector does not fit the sizes above.
  void check() const;
  /// Gives every quantised matrix that int8 activations meet, and every bf16 one that bf16 meets, a packed copy where
  /// the kernels read one. The embedding, which is read row by row, stays in place. `mapped` says that the matrices lie
  /// in read-only mappings of files: the memory of what has been packed is then given back to the system, so that no
  /// two copies are resident. What has been packed is not read again: see reads(). Throws std::bad_alloc.
  void pack(bool mapped);
  /// Whether rows of `w` are still read in place.
  bool reads(const Matrix& w) const;
  size_t packed_bytes() const;

 private:
  struct Free {
    void operator()(uint8_t* p) const;
  };
  std::unique_ptr<uint8_t[], Free> packed_;
};

}  // namespace specfast
