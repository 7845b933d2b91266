// The module specfast._mlx: a model's regions as primitives of MLX's graphs. Built against one version of mlx.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "mlx/ops.h"
#include "mlx_kv.hpp"
#include "mlx_launch.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using specfast::ModelRegions;

namespace {

/// Held by value, so that what primitives share is never owned by Python.
struct BoundGraph {
  GraphPtr graph;
};

void init_graph(BoundGraph* self, const nb::capsule& handle, const Arrays& embed,
                const std::vector<std::vector<Arrays>>& layers, const Arrays& head) {
  auto graph = std::make_shared<Graph>();
  graph->regions = *static_cast<GraphHandle*>(handle.data(kGraphHandleName));
  graph->embed = embed;
  graph->head = head;
  if (layers.size() != graph->model().layers.size())
    throw std::invalid_argument("the weights of " + std::to_string(graph->model().layers.size()) +
                                " layers are needed, got " + std::to_string(layers.size()));
  for (const auto& layer : layers) {
    if (layer.size() != 4) throw std::invalid_argument("a layer has the weights of qkv, o, swiglu and down");
    graph->layers.push_back({layer[0], layer[1], layer[2], layer[3]});
  }
  new (self) BoundGraph{std::move(graph)};
}

mx::array as(const mx::array& array, mx::Dtype dtype, const mx::Stream& stream) {
  return mx::contiguous(mx::astype(array, dtype, stream), false, stream);
}

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

mx::array rows_of(const mx::array& rows, int columns, const mx::Stream& stream) {
  require(rows.ndim() == 2 && rows.shape(0) > 0 && rows.shape(1) == columns, "rows of another width than the region's");
  return as(rows, mx::float32, stream);
}

int layer_of(const BoundGraph& self, int layer) {
  require(layer >= 0 && layer < static_cast<int>(self.graph->layers.size()), "there is no such layer");
  return layer;
}

mx::array tokens_of(const mx::array& tokens, const mx::Stream& stream) {
  require(tokens.ndim() == 1 && tokens.size() > 0, "tokens must be (M,) with M of at least 1");
  return as(tokens, mx::int32, stream);
}

mx::array offset_of(const mx::array& offset, const mx::Stream& stream) {
  require(offset.size() == 1, "offset must be one number");
  return offset.dtype() == mx::int32 ? offset : mx::astype(offset, mx::int32, stream);
}

/// The pages of the result, when kv is to have room for at least `pages`.
int64_t room(const BoundGraph& self, const mx::array& kv, int64_t pages) {
  require(pages >= 1, "at least one page is needed");
  return std::max(pages, kv::pages_of(self.graph->model(), kv));
}

ModelRegions::Projection projection_named(const std::string& name) {
  require(name == "o" || name == "down", "the projections are 'o' and 'down'");
  return name == "o" ? ModelRegions::Projection::o : ModelRegions::Projection::down;
}

}  // namespace

NB_MODULE(_mlx, m) {
  const nb::object version = nb::module_::import_("mlx.core").attr("__version__");
  if (nb::cast<std::string>(version) != SPECFAST_MLX_VERSION)
    throw nb::import_error(("specfast._mlx was built against mlx " SPECFAST_MLX_VERSION ", and this is mlx " +
                            nb::cast<std::string>(version))
                               .c_str());
  nb::set_leak_warnings(false);
  m.doc() = "Primitives of MLX's graphs on specfast's kernels. Every function takes the stream it runs on.";
  m.attr("MLX_VERSION") = SPECFAST_MLX_VERSION;
  const auto stream = nb::arg("stream") = nb::none();
  using Where = const mx::StreamOrDevice&;

  nb::class_<BoundGraph>(
      m, "Graph",
      "A model's regions. Made of specfast._core.Model.graph_handle() and of the arrays its weights "
      "lie in:\nembed [matrix], layers [[qkv], [o], [swiglu], [down]] each, head [norm, matrix].\n\n"
      "Rows are (M, columns) float32 with any M. kv, pages of 256 positions in an array (words,) uint32, is what "
      "these functions\nreturned, or at first of no words; a new kv may be the old one's memory, with all "
      "positions that were counted as they were.\noffset is the position of the first row, an "
      "array () int32 that need not be known yet. Rows of tokens outside the\nvocabulary, and rows "
      "beyond the pages, are NaN.")
      .def("__init__", &init_graph, "handle"_a, "embed"_a, "layers"_a, "head"_a)
      .def(
          "pages", [](const BoundGraph& self, const mx::array& kv) { return kv::pages_of(self.graph->model(), kv); },
          "kv"_a, "How many pages of 256 positions kv has.")
      .def(
          "embed_rows",
          [](const BoundGraph& self, const mx::array& tokens, Where where) {
            const mx::Stream s = mx::to_stream(where);
            return embed_rows(self.graph, tokens_of(tokens, s), s);
          },
          "tokens"_a, nb::kw_only(), stream, "tokens (M,) -> x (M, hidden).")
      .def(
          "qkv_rope_append",
          [](const BoundGraph& self, int layer, const mx::array& x, const mx::array& kv, const mx::array& offset,
             int64_t pages, Where where) {
            const mx::Stream s = mx::to_stream(where);
            return qkv_rope_append(self.graph, layer_of(self, layer), rows_of(x, self.graph->model().hidden, s), kv,
                                   offset_of(offset, s), room(self, kv, pages), s);
          },
          "layer"_a, "x"_a, "kv"_a, "offset"_a, "pages"_a, nb::kw_only(), stream,
          "x (M, hidden) -> rotated queries (M, heads * head_dim), and kv of at least `pages` pages with the rows.")
      .def(
          "attend_rows",
          [](const BoundGraph& self, int layer, const mx::array& q, const mx::array& kv, const mx::array& offset,
             Where where) {
            const mx::Stream s = mx::to_stream(where);
            kv::pages_of(self.graph->model(), kv);
            return attend_rows(self.graph, layer_of(self, layer), rows_of(q, self.graph->model().q_columns(), s), kv,
                               offset_of(offset, s), s);
          },
          "layer"_a, "q"_a, "kv"_a, "offset"_a, nb::kw_only(), stream,
          "Causal attention of q (M, heads * head_dim) over kv, which has these rows too.")
      .def(
          "matmul_rows",
          [](const BoundGraph& self, int layer, const std::string& projection, const mx::array& rows,
             const mx::array& x, Where where) {
            const mx::Stream s = mx::to_stream(where);
            const specfast::Model& model = self.graph->model();
            const ModelRegions::Projection named = projection_named(projection);
            const int K = named == ModelRegions::Projection::o ? model.q_columns() : model.intermediate;
            require(rows.ndim() == 2 && x.ndim() == 2 && rows.shape(0) == x.shape(0), "rows and x differ in length");
            return matmul_rows(self.graph, layer_of(self, layer), named, rows_of(rows, K, s),
                               rows_of(x, model.hidden, s), s);
          },
          "layer"_a, "projection"_a, "rows"_a, "x"_a, nb::kw_only(), stream,
          "x (M, hidden) + rows (M, K) times the layer's \"o\" or \"down\" matrix.")
      .def(
          "swiglu_rows",
          [](const BoundGraph& self, int layer, const mx::array& x, Where where) {
            const mx::Stream s = mx::to_stream(where);
            return swiglu_rows(self.graph, layer_of(self, layer), rows_of(x, self.graph->model().hidden, s), s);
          },
          "layer"_a, "x"_a, nb::kw_only(), stream, "x (M, hidden) -> silu(gate) * up (M, intermediate).")
      .def(
          "logits_rows",
          [](const BoundGraph& self, const mx::array& x, Where where) {
            const mx::Stream s = mx::to_stream(where);
            return logits_rows(self.graph, rows_of(x, self.graph->model().hidden, s), s);
          },
          "x"_a, nb::kw_only(), stream, "x (M, hidden) -> logits (M, vocab).")
      .def(
          "forward",
          [](const BoundGraph& self, const mx::array& tokens, const Arrays& kv, const mx::array& offset, int64_t pages,
             Where where) {
            const mx::Stream s = mx::to_stream(where);
            require(kv.size() == self.graph->layers.size(), "kv is needed of every layer");
            for (const mx::array& layer : kv) pages = room(self, layer, pages);
            return forward(self.graph, tokens_of(tokens, s), kv, offset_of(offset, s), pages, s);
          },
          "tokens"_a, "kv"_a, "offset"_a, "pages"_a, nb::kw_only(), stream,
          "All regions: tokens (M,) and every layer's kv -> logits (M, vocab) and every layer's kv with the rows.")
      .def(
          "write_rows",
          [](const BoundGraph& self, const mx::array& kv, const mx::array& keys, const mx::array& values,
             const mx::array& offset, int64_t pages, Where where) {
            const mx::Stream s = mx::to_stream(where);
            const specfast::Model& model = self.graph->model();
            require(keys.ndim() == 3 && keys.shape() == values.shape() && keys.shape(0) == model.kv_heads &&
                        keys.shape(2) == model.head_dim,
                    "keys and values must be (kv_heads, n, head_dim)");
            return write_rows(self.graph, kv, as(keys, mx::float32, s), as(values, mx::float32, s),
                              offset_of(offset, s), room(self, kv, pages), s);
          },
          "kv"_a, "keys"_a, "values"_a, "offset"_a, "pages"_a, nb::kw_only(), stream,
          "Rotated keys and values (kv_heads, n, head_dim) -> kv with them at offset and on.")
      .def(
          "read_rows",
          [](const BoundGraph& self, const mx::array& kv, int64_t n, Where where) {
            require(n >= 0 && n <= specfast::kPagePositions * kv::pages_of(self.graph->model(), kv),
                    "kv has fewer positions");
            return read_rows(self.graph, kv, n, mx::to_stream(where));
          },
          "kv"_a, "n"_a, nb::kw_only(), stream,
          "Copies of the first n keys and values (kv_heads, n, head_dim), bfloat16, or float32 at precision f32.")
      .def(
          "verify_tokens",
          [](const BoundGraph& self, const mx::array& p, const mx::array& q, const mx::array& tokens,
             const mx::array& u, const std::string& rule, double lenience, Where where) {
            const mx::Stream s = mx::to_stream(where);
            require(p.ndim() == 2 && q.ndim() == 2 && tokens.ndim() == 1 && u.ndim() == 1, "p and q must be matrices");
            const int gamma = tokens.shape(0);
            require(p.shape(0) == gamma + 1 && q.shape(0) == gamma && u.shape(0) == gamma + 1,
                    "p, q, tokens and u must be (gamma + 1, V), (gamma, Vq), (gamma,) and (gamma + 1,)");
            require(rule == "token" || rule == "block", "the rules are 'token' and 'block'");
            require(lenience > 0, "lenience must be positive");
            require(rule == "token" || lenience == 1, "the block rule takes lenience 1");
            const specfast::Rule named = rule == "block" ? specfast::Rule::block : specfast::Rule::token;
            return verify_tokens(self.graph, as(p, mx::float32, s), as(q, mx::float32, s), as(tokens, mx::int32, s),
                                 as(u, mx::float32, s), named, lenience, s);
          },
          "p"_a, "q"_a, "tokens"_a, "u"_a, nb::kw_only(), "rule"_a = "block", "lenience"_a = 1.0, stream,
          "p (gamma + 1, V), q (gamma, Vq), tokens (gamma,), u (gamma + 1,) float32 in [0, 1) -> tau () and the next "
          "token "
          "() int32,\nby specfast.ops.verify_tokens. A cache then counts offset + 1 + tau positions; kv stays as it "
          "is.");

  m.def(
      "launch",
      [](const std::string& library, const std::string& source, const std::string& function, std::array<size_t, 3> grid,
         std::array<size_t, 3> threadgroup, const std::vector<int32_t>& dims, const Arrays& inputs,
         const std::vector<std::vector<int>>& shapes, const std::vector<mx::Dtype>& dtypes, const Arrays& updated,
         bool shared, Where where) {
        const mx::Stream s = mx::to_stream(where);
        std::vector<mx::Shape> extents;
        for (const auto& shape : shapes) extents.emplace_back(shape.begin(), shape.end());
        const auto dense = [&](const Arrays& arrays) {
          Arrays rows;
          for (const mx::array& x : arrays) {
            const bool known = x.status() == mx::array::Status::available && x.flags().row_contiguous;
            rows.push_back(known ? x : mx::contiguous(x, false, s));
          }
          return rows;
        };
        return launch({library, source, function, grid, threadgroup, dims}, dense(inputs), std::move(extents), dtypes,
                      dense(updated), shared, s);
      },
      "library"_a, "source"_a, "function"_a, "grid"_a, "threadgroup"_a, "dims"_a, "inputs"_a, "shapes"_a, "dtypes"_a,
      "updated"_a = Arrays{}, nb::kw_only(), "shared"_a = false, stream,
      "One Metal kernel: buffers are inputs, new outputs of shapes and dtypes, updated, dims. Returns the new outputs "
      "and "
      "the\nupdated arrays, written in place, or in a copy where somebody else has them and shared is False.");
  m.def("accepts", [](const mx::array&) {}, "array"_a, "Raises TypeError where mlx.core has another nanobind's types.");
}
