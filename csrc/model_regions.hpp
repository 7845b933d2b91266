// A decoder's regions as calls by themselves, over rows and KV pages that a host's graph holds.
#pragma once

#include <memory>

#include "model.hpp"
#include "verify_tokens.hpp"

namespace specfast {

/// Keys and values of one layer in consecutive pages of somebody else's memory: page p holds positions 256 p and on,
/// head after head (see KvShape::head_page_bytes).
struct KvPages {
  uint8_t* data = nullptr;
  int64_t count = 0;

  int64_t positions() const { return count * kPagePositions; }
};

/// Rows are float32, row major and dense, any number of them: they run in the decoder's tiles and get its bits. Calls
/// may overlap. Nothing is thrown: rows that cannot be had (no memory, a token outside the vocabulary, a position
/// outside the pages) are NaN, and nothing is appended for them.
///
/// An abstract class, so that an extension module that does not link the kernels can call them.
class ModelRegions {
 public:
  enum class Projection : uint8_t { o, down };

  virtual ~ModelRegions() = default;
  virtual const Model& model() const noexcept = 0;

  /// x (count, hidden) = embeddings of tokens (count,).
  virtual void embed_rows(const int32_t* tokens, int64_t count, float* x) noexcept = 0;
  /// q (count, heads * head_dim) = the rotated queries of x (count, hidden) at `position` and on, whose keys and values
  /// are written to the pages.
  virtual void qkv_rope_append(int layer, const float* x, int64_t count, int64_t position, KvPages kv,
                               float* q) noexcept = 0;
  /// out (count, heads * head_dim) = causal attention of q at `position` and on.
  virtual void attend_rows(int layer, const float* q, int64_t count, int64_t position, KvPages kv,
                           float* out) noexcept = 0;
  /// out (count, hidden) = x + rows W, rows (count, K). out may be x.
  virtual void matmul_rows(int layer, Projection projection, const float* rows, const float* x, int64_t count,
                           float* out) noexcept = 0;
  /// out (count, intermediate) = silu(RMSNorm(x) Wgate) * (RMSNorm(x) Wup).
  virtual void swiglu_rows(int layer, const float* x, int64_t count, float* out) noexcept = 0;
  /// logits (count, vocab) = RMSNorm(x) Whead.
  virtual void logits_rows(const float* x, int64_t count, float* logits) noexcept = 0;

  /// Writes rotated keys and values (kv_heads, count, head_dim) at `position` and on.
  virtual void write_rows(KvPages kv, const float* keys, const float* values, int64_t count,
                          int64_t position) noexcept = 0;
  /// Copies the first `count` positions, in the cache's own elements, to keys and values (kv_heads, count, head_dim).
  virtual void read_rows(KvPages kv, int64_t count, void* keys, void* values) noexcept = 0;
  /// specfast::verify_tokens or, by the block rule, specfast::verify_block with the model's kernels.
  virtual Verdict verify_tokens(Rule rule, const float* p, int32_t V, const float* q, int32_t Vq, const int32_t* tokens,
                                int32_t gamma, const double* u, double lenience) noexcept = 0;
};

/// Throws ShapeError where a layer has a sliding window, or keys and values are quantised: the pages of a host hold all
/// positions, in bf16 or f32.
std::shared_ptr<ModelRegions> make_model_regions(std::shared_ptr<const Model> model);

}  // namespace specfast
