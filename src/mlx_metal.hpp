// The primitives on a Metal GPU: metal/<stem>.metal, dispatched by host name on MLX's encoder.
#pragma once

#include "mlx_graph.hpp"

namespace metal {

/// Throws std::runtime_error: there is no such kernel on this device.
[[noreturn]] void unavailable(const char* primitive);

// Inputs and outputs are the primitives' (mlx_graph.hpp), then the weights of the region.
void embed_rows(const mx::Stream& stream, const Graph& graph, const Arrays& in, Arrays& out);
void qkv_rope_append(const mx::Stream& stream, const Graph& graph, int layer, const Arrays& in, Arrays& out);
void attend_rows(const mx::Stream& stream, const Graph& graph, int layer, const Arrays& in, Arrays& out);
void matmul_rows(const mx::Stream& stream, const Graph& graph, int layer, specfast::ModelRegions::Projection projection,
                 const Arrays& in, Arrays& out);
void swiglu_rows(const mx::Stream& stream, const Graph& graph, int layer, const Arrays& in, Arrays& out);
void logits_rows(const mx::Stream& stream, const Graph& graph, const Arrays& in, Arrays& out);
void verify_tokens(const mx::Stream& stream, double lenience, const Arrays& in, Arrays& out);

}  // namespace metal
