// A model as specfast._mlx's primitives see it, and the functions that build their graphs.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <typeinfo>
#include <utility>
#include <vector>

#include "graph_handle.hpp"
#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace mx = mlx::core;

/// The native regions and the MLX arrays their weights lie in. The arrays are inputs of the primitives: they show in
/// the graph, are kept by it, and are what a GPU reads.
struct Graph {
  GraphHandle regions;
  std::vector<mx::array> embed, head;  // head: the final norm's weight, then the matrix
  struct Layer {
    std::vector<mx::array> qkv;  // the norm's weight, then of q, k and v the matrix and the bias if any, then QK-norms
    std::vector<mx::array> o;    // the matrix
    std::vector<mx::array> swiglu;  // the norm's weight, then gate and up
    std::vector<mx::array> down;    // the matrix
  };
  std::vector<Layer> layers;

  const specfast::Model& model() const { return regions->model(); }
};
using GraphPtr = std::shared_ptr<const Graph>;

/// A region of one model, and of one layer where it has several. On a GPU a model's graph is made of launches instead
/// (mlx_launch.hpp), whose kernels are not the native regions.
class Region : public mx::Primitive {
 public:
  Region(mx::Stream stream, GraphPtr graph, int layer)
      : mx::Primitive(stream), graph_(std::move(graph)), layer_(layer) {}
  bool is_equivalent(const mx::Primitive& other) const override {
    if (typeid(*this) != typeid(other)) return false;
    const Region& region = static_cast<const Region&>(other);
    return graph_ == region.graph_ && layer_ == region.layer_;
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error(std::string(name()) + " runs on the CPU; give it a stream of mx.cpu");
  }

 protected:
  const specfast::Model& model() const { return graph_->model(); }

  const GraphPtr graph_;
  const int layer_;
};

using Arrays = std::vector<mx::array>;

/// tokens (M,) int32 -> x (M, hidden) float32.
mx::array embed_rows(const GraphPtr& graph, const mx::array& tokens, mx::Stream stream);
/// x (M, hidden), kv, offset () int32 -> q (M, heads * head_dim), and kv of `pages` pages with the rows at offset and
/// on.
std::pair<mx::array, mx::array> qkv_rope_append(const GraphPtr& graph, int layer, const mx::array& x,
                                                const mx::array& kv, const mx::array& offset, int64_t pages,
                                                mx::Stream stream);
/// q at offset and on, over kv that holds these rows too -> (M, heads * head_dim).
mx::array attend_rows(const GraphPtr& graph, int layer, const mx::array& q, const mx::array& kv,
                      const mx::array& offset, mx::Stream stream);
/// x + rows W, with the layer's o or down matrix: (M, hidden).
mx::array matmul_rows(const GraphPtr& graph, int layer, specfast::ModelRegions::Projection projection,
                      const mx::array& rows, const mx::array& x, mx::Stream stream);
/// x (M, hidden) -> (M, intermediate).
mx::array swiglu_rows(const GraphPtr& graph, int layer, const mx::array& x, mx::Stream stream);
/// x (M, hidden) -> logits (M, vocab).
mx::array logits_rows(const GraphPtr& graph, const mx::array& x, mx::Stream stream);
/// All of them: tokens (M,) and kv of every layer -> logits (M, vocab), and the new kv.
std::pair<mx::array, Arrays> forward(const GraphPtr& graph, const mx::array& tokens, const Arrays& kv,
                                     const mx::array& offset, int64_t pages, mx::Stream stream);

/// keys and values (kv_heads, n, head_dim) float32 at offset and on -> kv of `pages` pages.
mx::array write_rows(const GraphPtr& graph, const mx::array& kv, const mx::array& keys, const mx::array& values,
                     const mx::array& offset, int64_t pages, mx::Stream stream);
/// The first n positions of kv -> keys and values (kv_heads, n, head_dim), bfloat16 or float32.
std::pair<mx::array, mx::array> read_rows(const GraphPtr& graph, const mx::array& kv, int64_t n, mx::Stream stream);

/// p (gamma + 1, V), q (gamma, Vq) float32, Vq 0 where the draft was certain, tokens (gamma,) int32, u (gamma + 1,)
/// float32 -> tau () and the next token () int32, by the token or the block rule.
std::pair<mx::array, mx::array> verify_tokens(const GraphPtr& graph, const mx::array& p, const mx::array& q,
                                              const mx::array& tokens, const mx::array& u, specfast::Rule rule,
                                              double lenience, mx::Stream stream);
