// Models: construction from Python dictionaries, forward, draft and verify.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings.hpp"

#include "dispatch.hpp"
#include "graph_handle.hpp"

using namespace specfast;

Precision precision_named(const std::string& name) {
  if (name == "int8") return Precision::int8;
  if (name == "bf16") return Precision::bf16;
  if (name == "f32") return Precision::f32;
  throw ShapeError("unknown precision '" + name + "'; supported: int8, bf16, f32");
}

const char* precision_name(Precision precision) {
  return precision == Precision::int8 ? "int8" : precision == Precision::bf16 ? "bf16" : "f32";
}

const KernelTable& kernels_named(const std::optional<std::string>& isa) {
  std::string why;
  const KernelTable* kernels = find_kernels(isa.value_or(""), &why);
  if (!kernels) throw ShapeError(why);
  return *kernels;
}

namespace {

std::vector<float> floats_of(const Floats& array) {
  return {array.data(), array.data() + array.size()};
}

std::vector<float> optional_floats(const nb::dict& layer, const char* key) {
  if (!layer.contains(key) || nb::object(layer[key]).is_none()) return {};
  Floats array;
  if (!nb::try_cast<Floats>(layer[key], array))
    throw ShapeError(std::string("a layer's '") + key + "' is not a float32 array");
  return floats_of(array);
}

Matrix matrix_of(const nb::dict& layer, const char* key, std::vector<BoundMatrix>* owners) {
  if (!layer.contains(key)) throw ShapeError(std::string("a layer lacks '") + key + "'");
  if (!nb::isinstance<BoundMatrix>(layer[key]))
    throw ShapeError(std::string("a layer's '") + key + "' is not a Matrix");
  const BoundMatrix& bound = nb::cast<const BoundMatrix&>(layer[key]);
  owners->push_back(bound);
  return bound.matrix;
}

void init_model(BoundModel* self, int32_t hidden, int32_t heads, int32_t kv_heads, int32_t head_dim,
                int32_t intermediate, int32_t vocab, float rms_eps, const Floats& rope_inv_freq, int64_t max_context,
                std::optional<const BoundMatrix*> embed, std::optional<const BoundMatrix*> head,
                const std::optional<Floats>& norm, const nb::list& layers, const std::string& precision,
                const std::optional<std::string>& isa, bool pack, bool mapped, int32_t kv_bits, bool rope_pairs) {
  auto model = std::make_shared<Model>();
  std::vector<BoundMatrix> owners;
  model->hidden = hidden;
  model->heads = heads;
  model->kv_heads = kv_heads;
  model->head_dim = head_dim;
  model->intermediate = intermediate;
  model->vocab = vocab;
  model->rms_eps = rms_eps;
  model->max_context = max_context;
  model->rope_pairs = rope_pairs;
  model->rope_inv_freq = floats_of(rope_inv_freq);
  if (embed && *embed) {
    owners.push_back(**embed);
    model->embed = (*embed)->matrix;
  }
  if (norm) {
    model->norm = floats_of(*norm);
    model->head = model->embed;
  }
  if (head && *head) {
    if (!norm) throw ShapeError("a head without the norm before it; leave both out where other layers follow");
    owners.push_back(**head);
    model->head = (*head)->matrix;
  }
  model->precision = precision_named(precision);
  if (kv_bits != 8 && kv_bits != 16)
    throw ShapeError("keys and values of " + std::to_string(kv_bits) + " bits are not supported; supported: 8, 16");
  model->kv_format = kv_bits == 8                         ? KvFormat::int8
                     : model->precision == Precision::f32 ? KvFormat::f32
                                                          : KvFormat::bf16;
  model->kernels = &kernels_named(isa);
  for (nb::handle item : layers) {
    if (!nb::isinstance<nb::dict>(item)) throw ShapeError("a layer is a dictionary of its matrices and vectors");
    const nb::dict layer = nb::cast<nb::dict>(item);
    LayerWeights w;
    w.q = matrix_of(layer, "q", &owners);
    w.k = matrix_of(layer, "k", &owners);
    w.v = matrix_of(layer, "v", &owners);
    w.o = matrix_of(layer, "o", &owners);
    w.gate = matrix_of(layer, "gate", &owners);
    w.up = matrix_of(layer, "up", &owners);
    w.down = matrix_of(layer, "down", &owners);
    w.input_norm = optional_floats(layer, "input_norm");
    w.post_norm = optional_floats(layer, "post_norm");
    w.q_bias = optional_floats(layer, "q_bias");
    w.k_bias = optional_floats(layer, "k_bias");
    w.v_bias = optional_floats(layer, "v_bias");
    w.q_norm = optional_floats(layer, "q_norm");
    w.k_norm = optional_floats(layer, "k_norm");
    if (layer.contains("window") && !nb::object(layer["window"]).is_none())
      w.window = nb::cast<int64_t>(layer["window"]);
    model->layers.push_back(std::move(w));
  }
  model->check();
  if (pack) {
    WithoutGil released;
    model->pack(mapped);
  }
  std::erase_if(owners, [&](const BoundMatrix& bound) { return !model->reads(bound.matrix); });
  new (self) BoundModel{std::move(model), std::move(owners)};
}

Sequence& sequence_of(const BoundModel& model, BoundCache& cache) {
  if (&cache.sequence->model() != model.model.get()) throw ShapeError("this cache belongs to another model");
  return *cache.sequence;
}

void require_tokens(const Tokens& tokens) {
  if (tokens.size() == 0) throw ShapeError("at least one token is needed, got none");
}

nb::ndarray<nb::numpy, float> forward(const BoundModel& self, BoundCache& cache, const Tokens& tokens,
                                      int32_t logits_rows) {
  Sequence& sequence = sequence_of(self, cache);
  require_tokens(tokens);
  if (logits_rows < 0 || static_cast<size_t>(logits_rows) > tokens.size())
    throw ShapeError("logits_rows " + std::to_string(logits_rows) + " is outside 0 to the " +
                     std::to_string(tokens.size()) + " tokens given");
  CacheUse use(cache);
  float* data;
  auto out = make_array(&data, {static_cast<size_t>(logits_rows), static_cast<size_t>(self.model->vocab)});
  WithoutGil released;
  sequence.forward(tokens.data(), static_cast<int64_t>(tokens.size()), logits_rows, self.model->vocab, data);
  return out;
}

using WritableRows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void forward_into(const BoundModel& self, BoundCache& cache, const Tokens& tokens, const WritableRows& out) {
  Sequence& sequence = sequence_of(self, cache);
  require_tokens(tokens);
  if (out.shape(0) > tokens.size() || out.shape(1) != static_cast<size_t>(self.model->vocab))
    throw ShapeError("out must be (rows, " + std::to_string(self.model->vocab) + ") with rows up to the " +
                     std::to_string(tokens.size()) + " tokens given, not (" + std::to_string(out.shape(0)) + ", " +
                     std::to_string(out.shape(1)) + ")");
  CacheUse use(cache);
  WithoutGil released;
  sequence.forward(tokens.data(), static_cast<int64_t>(tokens.size()), static_cast<int32_t>(out.shape(0)),
                   self.model->vocab, out.data());
}

nb::ndarray<nb::numpy, float> forward_range(const BoundModel& self, BoundCache& cache, const nb::object& rows) {
  Sequence& sequence = sequence_of(self, cache);
  const size_t hidden = static_cast<size_t>(self.model->hidden);
  Tokens tokens;
  Floats x;
  const bool ids = nb::try_cast<Tokens>(rows, tokens);
  if (!ids && !(nb::try_cast<Floats>(rows, x) && x.ndim() == 2 && x.shape(1) == hidden))
    throw ShapeError("rows are token ids (M,) int32 or (M, " + std::to_string(hidden) + ") float32");
  const size_t count = ids ? tokens.size() : x.shape(0);
  if (count == 0) throw ShapeError("at least one row is needed, got none");
  CacheUse use(cache);
  float* data;
  auto out = make_array(&data, {count, hidden});
  if (!ids) std::copy_n(x.data(), count * hidden, data);
  WithoutGil released;
  sequence.forward_range(ids ? tokens.data() : nullptr, data, static_cast<int64_t>(count));
  return out;
}

Verdict verify_range(const BoundModel& self, BoundCache& cache, const Floats& rows, const Proposal& proposal,
                     const Law& law, uint64_t seed, uint64_t round, const std::string& rule) {
  Sequence& sequence = sequence_of(self, cache);
  const Rule named = rule_named(rule);
  const size_t drafted = proposal.tokens.size();
  if (rows.ndim() != 2 || rows.shape(1) != static_cast<size_t>(self.model->hidden) || rows.shape(0) <= drafted)
    throw ShapeError("rows must be (M, " + std::to_string(self.model->hidden) + ") with M above the " +
                     std::to_string(drafted) + " drafted tokens");
  if (drafted > 64) throw ShapeError("a proposal of " + std::to_string(drafted) + " tokens is longer than 64");
  CacheUse use(cache);
  std::vector<float> x(rows.data(), rows.data() + rows.size());
  WithoutGil released;
  sequence.cache().drop_to(0);
  return sequence.verify_range(x.data(), static_cast<int64_t>(rows.shape(0) - drafted), proposal, law, 1.0, seed, round,
                               named);
}

void prefill(const BoundModel& self, BoundCache& cache, const Tokens& tokens) {
  Sequence& sequence = sequence_of(self, cache);
  require_tokens(tokens);
  CacheUse use(cache);
  WithoutGil released;
  sequence.cache().drop_to(0);
  sequence.forward(tokens.data(), static_cast<int64_t>(tokens.size()), 0, 0);
  sequence.cache().commit(static_cast<int64_t>(tokens.size()));
}

void draft(const BoundModel& self, BoundCache& cache, const Tokens& pending, int32_t gamma, const Law& law,
           uint64_t seed, uint64_t round, Proposal& proposal, const std::string& rule,
           std::optional<Adjustments*> adjustments) {
  Sequence& sequence = sequence_of(self, cache);
  require_tokens(pending);
  const Rule named = rule_named(rule);
  if (gamma < 0 || gamma > 64) throw ShapeError("gamma " + std::to_string(gamma) + " is outside 0 to 64");
  CacheUse use(cache);
  WithoutGil released;
  sequence.cache().drop_to(0);
  sequence.draft(pending.data(), static_cast<int64_t>(pending.size()), gamma, law, seed, round, proposal, named,
                 adjustments.value_or(nullptr));
}

int32_t require_exit(const BoundModel& self, int32_t layers) {
  const int32_t last = static_cast<int32_t>(self.model->layers.size()) - 1;
  if (layers < 1 || layers > last)
    throw ShapeError("an exit after layer " + std::to_string(layers) + " is outside 1 to " + std::to_string(last) +
                     ": the model has " + std::to_string(last + 1) + " layers");
  return layers;
}

void draft_early(const BoundModel& self, BoundCache& cache, const Tokens& pending, int32_t gamma, int32_t layers,
                 const Law& law, uint64_t seed, uint64_t round, Proposal& proposal, const std::string& rule,
                 std::optional<Adjustments*> adjustments) {
  Sequence& sequence = sequence_of(self, cache);
  require_tokens(pending);
  const Rule named = rule_named(rule);
  require_exit(self, layers);
  if (gamma < 0 || gamma > 64) throw ShapeError("gamma " + std::to_string(gamma) + " is outside 0 to 64");
  CacheUse use(cache);
  WithoutGil released;
  sequence.draft_early(pending.data(), static_cast<int64_t>(pending.size()), gamma, layers, law, seed, round, proposal,
                       named, adjustments.value_or(nullptr));
}

nb::ndarray<nb::numpy, double> exit_acceptance(const BoundModel& self, BoundCache& cache, const Tokens& tokens,
                                               const Tokens& exits, const Law& law) {
  Sequence& sequence = sequence_of(self, cache);
  require_tokens(tokens);
  std::vector<int32_t> layers(exits.data(), exits.data() + exits.size());
  for (size_t i = 0; i < layers.size(); i++) {
    if (require_exit(self, layers[i]); i > 0 && layers[i] <= layers[i - 1])
      throw ShapeError("exits must ascend; " + std::to_string(layers[i]) + " follows " + std::to_string(layers[i - 1]));
  }
  double* data;
  auto out = make_array(&data, {layers.size()});
  if (layers.empty()) return out;
  CacheUse use(cache);
  WithoutGil released;
  const auto found = sequence.exit_acceptance(tokens.data(), static_cast<int64_t>(tokens.size()), layers, law);
  std::copy(found.begin(), found.end(), data);
  return out;
}

Verdict verify(const BoundModel& self, BoundCache& cache, const Tokens& pending, const Proposal* proposal,
               const Law& law, double lenience, uint64_t seed, uint64_t round, const std::string& rule,
               std::optional<Adjustments*> adjustments) {
  Sequence& sequence = sequence_of(self, cache);
  require_tokens(pending);
  static const Proposal kNothing;
  const Proposal& drafted = proposal ? *proposal : kNothing;
  const Rule named = rule_named(rule);
  if (named != Rule::token && lenience != 1.0)
    throw ShapeError("the " + rule + " rule takes lenience 1, not " + std::to_string(lenience) +
                     "; use the token rule");
  if (drafted.gamma() > 64)
    throw ShapeError("a proposal of " + std::to_string(drafted.gamma()) + " tokens is longer than 64");
  if (!(lenience > 0.0)) throw ShapeError("lenience must be positive, not " + std::to_string(lenience));
  CacheUse use(cache);
  WithoutGil released;
  sequence.cache().drop_to(0);
  return sequence.verify(pending.data(), static_cast<int64_t>(pending.size()), drafted, law, lenience, seed, round,
                         named, adjustments.value_or(nullptr));
}

nb::capsule graph_handle(const BoundModel& self) {
  auto* handle = new GraphHandle(make_model_regions(self.model));
  return nb::capsule(handle, kGraphHandleName, [](void* p) noexcept { delete static_cast<GraphHandle*>(p); });
}

}  // namespace

void bind_model(nb::module_& m) {
  nb::class_<BoundModel>(
      m, "Model",
      "A decoder's weights, used in place, bound to the kernels of one instruction set and one precision.\n\n"
      "pack gives quantised and bf16 matrices a second copy in the order the kernels stream, where they have one "
      "(AVX-512, at\nprecision int8 and bf16);\n"
      "False reads all weights in place, slower. mapped says that all matrices lie in read-only mappings of files, "
      "whose\nmemory is given back once packed; other arrays are let go. Results of a row are the same bits for any\n"
      "number of rows and threads, packed or not. A layer's \"window\" is how many positions up to its own a row "
      "attends "
      "to. kv_bits 8 keeps keys and values as int8 with a float32 scale for each vector; 16 keeps them as bf16, or as "
      "float32\nwhen the precision is f32. rope_pairs says that RoPE turns neighbours (2 i, 2 i + 1) of a head.\n\n"
      "A range of a model's layers has no embed where layers come before it, and neither norm nor head where layers "
      "follow; it\nruns by forward_range and verify_range. A head that is None with a norm is the embed.")
      .def("__init__", &init_model, nb::kw_only(), nb::arg("hidden"), nb::arg("heads"), nb::arg("kv_heads"),
           nb::arg("head_dim"), nb::arg("intermediate"), nb::arg("vocab"), nb::arg("rms_eps"), nb::arg("rope_inv_freq"),
           nb::arg("max_context"), nb::arg("embed").none(), nb::arg("head").none(), nb::arg("norm").none(),
           nb::arg("layers"), nb::arg("precision") = "int8", nb::arg("isa") = nb::none(), nb::arg("pack") = true,
           nb::arg("mapped") = false, nb::arg("kv_bits") = 16, nb::arg("rope_pairs") = false)
      .def("forward", &forward, nb::arg("cache"), nb::arg("tokens"), nb::arg("logits_rows") = 1,
           "Appends tokens (M,) int32 provisionally; returns the logits (logits_rows, vocab) float32 of the last "
           "rows.\n\n"
           "Raises ContextFullError or ShapeError with the cache unchanged.")
      .def("forward_into", &forward_into, nb::arg("cache"), nb::arg("tokens"), nb::arg("out").noconvert(),
           "Appends tokens (M,) int32 provisionally and writes the logits of the last rows to out (rows, vocab) "
           "float32.\n\n"
           "Raises ContextFullError or ShapeError with the cache unchanged.")
      .def("forward_range", &forward_range, nb::arg("cache"), nb::arg("rows"),
           nb::sig("def forward_range(self, cache: Cache, rows: NDArray[numpy.int32] | NDArray[numpy.float32]) -> "
                   "NDArray[numpy.float32]"),
           "Appends rows provisionally to a range of layers that is not the last: token ids (M,) int32 for the first, "
           "else what\nthe range before returned. Returns (M, hidden) float32, what the next range takes; ranges give "
           "the bits of the whole.\n\nRaises ContextFullError or ShapeError with the cache unchanged.")
      .def(
          "verify_range", &verify_range, nb::arg("cache"), nb::arg("rows"), nb::arg("proposal"), nb::arg("law"),
          nb::arg("seed"), nb::arg("round"), nb::arg("rule") = "token",
          "verify, at lenience 1, by the last range of layers: rows (M, hidden) float32 of the pending and the drafted "
          "tokens, as\nthe range before returned them. Raises what verify raises, with the cache unchanged.")
      .def("prefill", &prefill, nb::arg("cache"), nb::arg("tokens"),
           "Appends and commits tokens (M,) int32 without logits.")
      .def("draft", &draft, nb::arg("cache"), nb::arg("pending"), nb::arg("gamma"), nb::arg("law"), nb::arg("seed"),
           nb::arg("round"), nb::arg("proposal"), nb::arg("rule") = "token", nb::arg("adjustments") = nb::none(),
           "Commits pending (n,) int32, then drafts gamma tokens into proposal; gamma - 1 of them stay provisional.\n\n"
           "rule \"coupled\" chooses them by the noise of their positions in the text; seed and round key other draws.")
      .def("draft_early", &draft_early, nb::arg("cache"), nb::arg("pending"), nb::arg("gamma"), nb::arg("layers"),
           nb::arg("law"), nb::arg("seed"), nb::arg("round"), nb::arg("proposal"), nb::arg("rule") = "token",
           nb::arg("adjustments") = nb::none(),
           "Drafts gamma tokens after pending (n,) int32 with the first layers, the final norm and the head.\n\n"
           "Appends nothing; a verify of the same tokens that comes next goes on from these layers, with the bits of "
           "one "
           "that\nstarts anew. Raises ShapeError where layers is not 1 to model.layers - 1, and ContextFullError where "
           "the cache has no\nroom for pending and gamma more, with the cache unchanged.")
      .def("exit_acceptance", &exit_acceptance, nb::arg("cache"), nb::arg("tokens"), nb::arg("exits"), nb::arg("law"),
           "Appends tokens (M,) int32 provisionally; returns, for each of exits (n,) int32 (numbers of layers, "
           "ascending), "
           "the\nmean over the rows of sum(min(p, q)), (n,) float64: the chance that a token drafted after so many "
           "layers "
           "is accepted.\n\n"
           "Raises what verify and draft_early raise, with the cache unchanged.")
      .def("verify", &verify, nb::arg("cache"), nb::arg("pending"), nb::arg("proposal").none(), nb::arg("law"),
           nb::arg("lenience"), nb::arg("seed"), nb::arg("round"), nb::arg("rule") = "token",
           nb::arg("adjustments") = nb::none(),
           "Appends pending and the drafted tokens provisionally in one pass and applies a rule, or greedy.\n\n"
           "rule: token (with a lenience), block (which is token where the proposal has no laws), or coupled.\n"
           "Raises NumericalError on logits that are not finite, with the cache unchanged.")
      .def("graph_handle", &graph_handle, nb::sig("def graph_handle(self) -> object"),
           "The model's regions for specfast._mlx. The weights' memory must be kept by whoever holds it.")
      .def_prop_ro("hidden", [](const BoundModel& self) { return self.model->hidden; })
      .def_prop_ro("heads", [](const BoundModel& self) { return self.model->heads; })
      .def_prop_ro("kv_heads", [](const BoundModel& self) { return self.model->kv_heads; })
      .def_prop_ro("head_dim", [](const BoundModel& self) { return self.model->head_dim; })
      .def_prop_ro("intermediate", [](const BoundModel& self) { return self.model->intermediate; })
      .def_prop_ro("vocab", [](const BoundModel& self) { return self.model->vocab; })
      .def_prop_ro("layers", [](const BoundModel& self) { return self.model->layers.size(); })
      .def_prop_ro(
          "windows",
          [](const BoundModel& self) {
            std::vector<int64_t> sizes;
            for (const Window& window : self.model->windows()) sizes.push_back(window.size);
            return sizes;
          },
          "For each layer, how many positions up to its own a row attends to; 0: all.")
      .def_prop_ro("max_context", [](const BoundModel& self) { return self.model->max_context; })
      .def_prop_ro("precision", [](const BoundModel& self) { return precision_name(self.model->precision); })
      .def_prop_ro("isa", [](const BoundModel& self) { return self.model->kernels->isa; })
      .def_prop_ro(
          "kv_bits", [](const BoundModel& self) { return 8 * self.model->kv_shape().element_bytes(); },
          "Bits of an element of a key or value.")
      .def_prop_ro(
          "kv_bytes_per_position",
          [](const BoundModel& self) {
            const KvShape shape = self.model->kv_shape();
            return shape.head_page_bytes() / kPagePositions * static_cast<size_t>(shape.layers * shape.kv_heads);
          },
          "Bytes of keys, values and scales that one position takes in all layers.")
      .def_prop_ro(
          "weight_bytes", [](const BoundModel& self) { return self.model->pass_bytes(); },
          "Bytes of weights one pass streams.")
      .def(
          "early_bytes",
          [](const BoundModel& self, int32_t layers) { return self.model->pass_bytes(require_exit(self, layers)); },
          nb::arg("layers"), "Bytes of weights a pass over the first layers and the head streams.")
      .def_prop_ro("packed_bytes", [](const BoundModel& self) { return self.model->packed_bytes(); })
      .def_prop_ro(
          "macs_per_row", [](const BoundModel& self) { return self.model->row_macs(); },
          "Multiply-adds of one row's matmuls.");
}
