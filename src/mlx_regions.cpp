// One MLX primitive per region of the decoder: on the CPU the native regions, on the thread of the stream.
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx_donation.hpp"
#include "mlx_kv.hpp"

using namespace specfast;

namespace {

constexpr int kNoLayer = -1;

int rows_of(const mx::array& rows) {
  return static_cast<int>(rows.shape(0));
}

float* allocate(mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  return out.data<float>();
}

mx::array single(const std::shared_ptr<Region>& region, mx::Shape shape, Arrays inputs, const Arrays& weights) {
  inputs.insert(inputs.end(), weights.begin(), weights.end());
  return mx::array(std::move(shape), mx::float32, region, std::move(inputs));
}

class EmbedRows final : public Region {
 public:
  using Region::Region;
  const char* name() const override { return "SpecfastEmbedRows"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {{rows_of(in[0]), model().hidden}}; }
  void eval_cpu(const Arrays& in, Arrays& out) override {
    mx::cpu::get_command_encoder(stream()).dispatch(
        [graph = graph_, M = rows_of(in[0]), tokens = in[0].data<int32_t>(), x = allocate(out[0])] {
          graph->regions->embed_rows(tokens, M, x);
        });
  }
};

class QkvRopeAppend final : public Region {
 public:
  QkvRopeAppend(mx::Stream stream, GraphPtr graph, int layer, int64_t pages)
      : Region(stream, std::move(graph), layer), pages_(pages) {}
  const char* name() const override { return "SpecfastQkvRopeAppend"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return Region::is_equivalent(other) && pages_ == static_cast<const QkvRopeAppend&>(other).pages_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override {
    return {{rows_of(in[0]), model().q_columns()}, {static_cast<int>(kv::words(model(), pages_))}};
  }
  void eval_cpu(const Arrays& in, Arrays& out) override {
    release_siblings(in, out);
    const int M = rows_of(in[0]);
    const kv::Append append = kv::append(model(), in[1], out[1], kv::known(in[2]), M);
    mx::cpu::get_command_encoder(stream()).dispatch([graph = graph_, layer = layer_, M, append, x = in[0].data<float>(),
                                                     offset = in[2].data<int32_t>(), q = allocate(out[0])] {
      append.copy();
      graph->regions->qkv_rope_append(layer, x, M, *offset, append.to, q);
    });
  }

 private:
  const int64_t pages_;
};

class AttendRows final : public Region {
 public:
  using Region::Region;
  const char* name() const override { return "SpecfastAttendRows"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {in[0].shape()}; }
  void eval_cpu(const Arrays& in, Arrays& out) override {
    mx::cpu::get_command_encoder(stream()).dispatch(
        [graph = graph_, layer = layer_, M = rows_of(in[0]), pages = kv::view(model(), in[1]), q = in[0].data<float>(),
         offset = in[2].data<int32_t>(),
         attended = allocate(out[0])] { graph->regions->attend_rows(layer, q, M, *offset, pages, attended); });
  }
};

class MatmulRows final : public Region {
 public:
  using Projection = ModelRegions::Projection;
  MatmulRows(mx::Stream stream, GraphPtr graph, int layer, Projection projection)
      : Region(stream, std::move(graph), layer), projection_(projection) {}
  const char* name() const override { return "SpecfastMatmulRows"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return Region::is_equivalent(other) && projection_ == static_cast<const MatmulRows&>(other).projection_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {in[1].shape()}; }
  void eval_cpu(const Arrays& in, Arrays& out) override {
    if (in[1].is_donatable()) {
      out[0].copy_shared_buffer(in[1]);
    } else {
      allocate(out[0]);
    }
    mx::cpu::get_command_encoder(stream()).dispatch(
        [graph = graph_, layer = layer_, projection = projection_, M = rows_of(in[0]), rows = in[0].data<float>(),
         x = in[1].data<float>(),
         y = out[0].data<float>()] { graph->regions->matmul_rows(layer, projection, rows, x, M, y); });
  }

 private:
  const Projection projection_;
};

class SwigluRows final : public Region {
 public:
  using Region::Region;
  const char* name() const override { return "SpecfastSwigluRows"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {{rows_of(in[0]), model().intermediate}}; }
  void eval_cpu(const Arrays& in, Arrays& out) override {
    mx::cpu::get_command_encoder(stream()).dispatch(
        [graph = graph_, layer = layer_, M = rows_of(in[0]), x = in[0].data<float>(), h = allocate(out[0])] {
          graph->regions->swiglu_rows(layer, x, M, h);
        });
  }
};

class LogitsRows final : public Region {
 public:
  using Region::Region;
  const char* name() const override { return "SpecfastLogitsRows"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {{rows_of(in[0]), model().vocab}}; }
  void eval_cpu(const Arrays& in, Arrays& out) override {
    mx::cpu::get_command_encoder(stream()).dispatch(
        [graph = graph_, M = rows_of(in[0]), x = in[0].data<float>(), logits = allocate(out[0])] {
          graph->regions->logits_rows(x, M, logits);
        });
  }
};

class VerifyTokens final : public Region {
 public:
  VerifyTokens(mx::Stream stream, GraphPtr graph, Rule rule, double lenience)
      : Region(stream, std::move(graph), kNoLayer), rule_(rule), lenience_(lenience) {}
  const char* name() const override { return "SpecfastVerifyTokens"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    if (!Region::is_equivalent(other)) return false;
    const VerifyTokens& verify = static_cast<const VerifyTokens&>(other);
    return rule_ == verify.rule_ && lenience_ == verify.lenience_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays&) override { return {{}, {}}; }
  void eval_cpu(const Arrays& in, Arrays& out) override {
    for (mx::array& scalar : out) scalar.set_data(mx::allocator::malloc(scalar.nbytes()));
    const mx::array &p = in[0], &q = in[1];
    mx::cpu::get_command_encoder(stream()).dispatch(
        [graph = graph_, p = p.data<float>(), V = p.shape(1), q = q.data<float>(), Vq = q.shape(1), gamma = q.shape(0),
         tokens = in[2].data<int32_t>(), u = in[3].data<float>(), rule = rule_, lenience = lenience_,
         tau = out[0].data<int32_t>(), next = out[1].data<int32_t>()] {
          const std::vector<double> draws(u, u + gamma + 1);
          const Verdict verdict =
              graph->regions->verify_tokens(rule, p, V, Vq ? q : nullptr, Vq, tokens, gamma, draws.data(), lenience);
          *tau = verdict.tau;
          *next = verdict.next_token;
        });
  }

 private:
  const Rule rule_;
  const double lenience_;
};

}  // namespace

mx::array embed_rows(const GraphPtr& graph, const mx::array& tokens, mx::Stream stream) {
  return single(std::make_shared<EmbedRows>(stream, graph, kNoLayer), {rows_of(tokens), graph->model().hidden},
                {tokens}, graph->embed);
}

std::pair<mx::array, mx::array> qkv_rope_append(const GraphPtr& graph, int layer, const mx::array& x,
                                                const mx::array& kv, const mx::array& offset, int64_t pages,
                                                mx::Stream stream) {
  const Model& model = graph->model();
  Arrays inputs{x, kv, offset};
  const Arrays& weights = graph->layers[static_cast<size_t>(layer)].qkv;
  inputs.insert(inputs.end(), weights.begin(), weights.end());
  const Arrays outputs = mx::array::make_arrays(
      {{rows_of(x), model.q_columns()}, {static_cast<int>(kv::words(model, pages))}}, {mx::float32, mx::uint32},
      std::make_shared<QkvRopeAppend>(stream, graph, layer, pages), inputs);
  return {outputs[0], outputs[1]};
}

mx::array attend_rows(const GraphPtr& graph, int layer, const mx::array& q, const mx::array& kv,
                      const mx::array& offset, mx::Stream stream) {
  return single(std::make_shared<AttendRows>(stream, graph, layer), q.shape(), {q, kv, offset}, {});
}

mx::array matmul_rows(const GraphPtr& graph, int layer, ModelRegions::Projection projection, const mx::array& rows,
                      const mx::array& x, mx::Stream stream) {
  const Graph::Layer& weights = graph->layers[static_cast<size_t>(layer)];
  return single(std::make_shared<MatmulRows>(stream, graph, layer, projection), x.shape(), {rows, x},
                projection == ModelRegions::Projection::o ? weights.o : weights.down);
}

mx::array swiglu_rows(const GraphPtr& graph, int layer, const mx::array& x, mx::Stream stream) {
  return single(std::make_shared<SwigluRows>(stream, graph, layer), {rows_of(x), graph->model().intermediate}, {x},
                graph->layers[static_cast<size_t>(layer)].swiglu);
}

mx::array logits_rows(const GraphPtr& graph, const mx::array& x, mx::Stream stream) {
  return single(std::make_shared<LogitsRows>(stream, graph, kNoLayer), {rows_of(x), graph->model().vocab}, {x},
                graph->head);
}

std::pair<mx::array, Arrays> forward(const GraphPtr& graph, const mx::array& tokens, const Arrays& kv,
                                     const mx::array& offset, int64_t pages, mx::Stream stream) {
  using Projection = ModelRegions::Projection;
  mx::array x = embed_rows(graph, tokens, stream);
  Arrays appended;
  for (int layer = 0; layer < static_cast<int>(kv.size()); layer++) {
    auto [q, pages_of_layer] = qkv_rope_append(graph, layer, x, kv[static_cast<size_t>(layer)], offset, pages, stream);
    const mx::array attended = attend_rows(graph, layer, q, pages_of_layer, offset, stream);
    x = matmul_rows(graph, layer, Projection::o, attended, x, stream);
    x = matmul_rows(graph, layer, Projection::down, swiglu_rows(graph, layer, x, stream), x, stream);
    appended.push_back(pages_of_layer);
  }
  return {logits_rows(graph, x, stream), appended};
}

std::pair<mx::array, mx::array> verify_tokens(const GraphPtr& graph, const mx::array& p, const mx::array& q,
                                              const mx::array& tokens, const mx::array& u, Rule rule, double lenience,
                                              mx::Stream stream) {
  const Arrays out =
      mx::array::make_arrays({{}, {}}, {mx::int32, mx::int32},
                             std::make_shared<VerifyTokens>(stream, graph, rule, lenience), {p, q, tokens, u});
  return {out[0], out[1]};
}
