// Models and caches: construction from Python dictionaries, forward, draft and verify.
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

KvShape affine_shape(KvShape shape, int32_t bits, int32_t group) {
  const bool known = (bits == 4 || bits == 8) && (group == 32 || group == 64 || group == 128);
  if (!known || shape.head_dim % group)
    throw ShapeError("keys and values of head_dim " + std::to_string(shape.head_dim) + " in " + std::to_string(bits) +
                     " bits and groups of " + std::to_string(group) +
                     " are not supported; supported: 4 or 8 bits in groups of 32, 64 or 128 that divide it");
  shape.format = KvFormat::affine;
  shape.bits = bits;
  shape.group = group;
  return shape;
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

/// The windows of a cache's layers where they are not the model's.
std::vector<Window> windows_of(const Model& model, const std::vector<int64_t>& sizes,
                               const std::vector<int64_t>& sinks) {
  if (sizes.size() != model.layers.size() || sinks.size() != sizes.size())
    throw ShapeError("windows and sinks of " + std::to_string(model.layers.size()) + " layers are needed, got " +
                     std::to_string(sizes.size()) + " and " + std::to_string(sinks.size()));
  constexpr int64_t most = int64_t{1} << 30;
  std::vector<Window> windows;
  for (size_t i = 0; i < sizes.size(); i++) {
    for (const int64_t n : {sizes[i], sinks[i]}) {
      if (n < 0 || n > most)
        throw ShapeError("a layer's window or sinks are " + std::to_string(n) + ", outside 0 to " +
                         std::to_string(most));
    }
    windows.push_back({sizes[i], sizes[i] ? sinks[i] : 0});
  }
  return windows;
}

void init_cache(BoundCache* self, const BoundModel& model, int64_t capacity,
                const std::optional<std::vector<int64_t>>& windows, const std::optional<std::vector<int64_t>>& sinks,
                int64_t undo, const std::optional<std::pair<int32_t, int32_t>>& kv_codes) {
  if (capacity < 0 || capacity > model.model->max_context)
    throw ShapeError("capacity " + std::to_string(capacity) + " is outside 1 to the model's context of " +
                     std::to_string(model.model->max_context));
  if (undo < 0) throw ShapeError("undo is " + std::to_string(undo) + ", but must not be negative");
  if (sinks && !windows) throw ShapeError("sinks are those of windows, which are not given");
  const std::vector<Window> own =
      windows ? windows_of(*model.model, *windows, sinks.value_or(std::vector<int64_t>(windows->size())))
              : model.model->windows();
  KvShape shape = model.model->kv_shape();
  if (kv_codes) {
    shape = affine_shape(shape, kv_codes->first, kv_codes->second);
    shape.bf16_scales = model.model->precision != Precision::f32;
  }
  for (const Window& window : own) {
    if (kv_codes && window.size) throw ShapeError("kv_codes are for layers without a sliding window");
  }
  auto sequence =
      std::make_unique<Sequence>(model.model, shape, own, capacity ? capacity : model.model->max_context, undo);
  new (self) BoundCache();
  self->sequence = std::move(sequence);
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

void require_plain_rows(const KvCache& cache) {
  if (cache.shape().format == KvFormat::int8 || cache.shape().format == KvFormat::affine)
    throw ShapeError("keys and values can be read and replaced in bf16 and f32");
}

/// Keys or values of a layer's committed positions in the cache's own elements: all or, of a layer with a window, its
/// sinks and the last `window`.
nb::object stored_rows(BoundCache& self, int layer, std::optional<int64_t> given_length, bool keys) {
  const KvCache& cache = self.sequence->cache();
  const KvShape& shape = cache.shape();
  require_plain_rows(cache);
  if (layer < 0 || layer >= shape.layers)
    throw ShapeError("layer " + std::to_string(layer) + " is outside 0 to the model's " + std::to_string(shape.layers));
  CacheUse use(self);
  const Window& window = cache.window(layer);
  const int64_t length = given_length.value_or(cache.length()), first = window.first(length - 1);
  if (length < 0 || length > cache.length())
    throw ShapeError("cannot read " + std::to_string(length) + " positions: the cache holds " +
                     std::to_string(cache.length()));
  if (first < cache.first_held(layer))
    throw ShapeError("position " + std::to_string(first) + " has left layer " + std::to_string(layer) +
                     ": a cache that is read needs an undo of 1 or more");
  const int64_t head_rows = first ? window.sinks : 0;
  const size_t rows = static_cast<size_t>(head_rows + length - first), heads = static_cast<size_t>(shape.kv_heads),
               dim = static_cast<size_t>(shape.head_dim);
  const auto read = [&](auto* data, auto out) {
    {
      WithoutGil released;
      auto *k = keys ? data : nullptr, *v = keys ? nullptr : data;
      const int64_t total = static_cast<int64_t>(rows);
      cache.read(layer, 0, head_rows, 0, total, k, v);
      cache.read(layer, first, length - first, head_rows, total, k, v);
    }
    return nb::cast(std::move(out));
  };
  if (shape.format == KvFormat::bf16) {
    uint16_t* data;
    auto out = make_array(&data, {heads, rows, dim});
    return read(data, std::move(out));
  }
  float* data;
  auto out = make_array(&data, {heads, rows, dim});
  return read(data, std::move(out));
}

void assign(BoundCache& self, const nb::list& keys, const nb::list& values, std::optional<int64_t> given_length) {
  const KvCache& cache = self.sequence->cache();
  const KvShape& shape = cache.shape();
  require_plain_rows(cache);
  if (nb::len(keys) != static_cast<size_t>(shape.layers) || nb::len(values) != nb::len(keys))
    throw ShapeError("keys and values of " + std::to_string(shape.layers) + " layers are needed, got " +
                     std::to_string(nb::len(keys)) + " and " + std::to_string(nb::len(values)));
  std::vector<Floats> owners;
  std::vector<const float*> k, v;
  for (const auto& [list, pointers] : {std::pair{&keys, &k}, std::pair{&values, &v}}) {
    for (nb::handle item : *list) {
      owners.emplace_back();
      Floats& rows = owners.back();
      if (!nb::try_cast<Floats>(item, rows)) throw ShapeError("keys and values are not all float32 arrays");
      const size_t layer = pointers->size();
      const bool fits = rows.ndim() == 3 && rows.shape(0) == static_cast<size_t>(shape.kv_heads) &&
                        rows.shape(1) == owners[layer].shape(1) && rows.shape(2) == static_cast<size_t>(shape.head_dim);
      if (!fits)
        throw ShapeError("keys and values must be (" + std::to_string(shape.kv_heads) + ", rows, " +
                         std::to_string(shape.head_dim) + ") with the same rows in both");
      pointers->push_back(rows.data());
    }
  }
  std::vector<int64_t> rows;
  for (size_t layer = 0; layer < k.size(); layer++) rows.push_back(static_cast<int64_t>(owners[layer].shape(1)));
  const int64_t length = given_length.value_or(rows.front());
  for (size_t layer = 0; layer < rows.size(); layer++) {
    const Window& window = cache.window(static_cast<int>(layer));
    const int64_t first = window.first(length), least = first ? window.sinks + length - first : length;
    if (rows[layer] < least || rows[layer] > length)
      throw ShapeError("layer " + std::to_string(layer) + " is given " + std::to_string(rows[layer]) + " rows; " +
                       std::to_string(length) + " positions need " + std::to_string(least) + " to " +
                       std::to_string(length));
  }
  CacheUse use(self);
  WithoutGil released;
  self.sequence->assign(length, rows, k.data(), v.data());
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

using Codes = nb::ndarray<const uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Groups = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using CodedRows = std::tuple<Codes, Groups, Groups>;

void require_codes(const KvCache& cache) {
  if (cache.shape().format != KvFormat::affine)
    throw ShapeError("this cache has no codes; it was not made with kv_codes");
}

nb::tuple stored_codes(BoundCache& self, int layer, bool keys, std::optional<int64_t> given_length) {
  const KvCache& cache = self.sequence->cache();
  const KvShape& shape = cache.shape();
  require_codes(cache);
  const int64_t length = given_length.value_or(cache.length());
  if (layer < 0 || layer >= shape.layers || length < 0 || length > cache.length())
    throw ShapeError("no layer " + std::to_string(layer) + " of " + std::to_string(length) + " positions: there are " +
                     std::to_string(shape.layers) + " of " + std::to_string(cache.length()));
  CacheUse use(self);
  const size_t heads = static_cast<size_t>(shape.kv_heads), rows = static_cast<size_t>(length);
  KvCache::Codes to;
  auto codes = make_array(&to.codes, {heads, rows, static_cast<size_t>(shape.head_dim)});
  auto scales = make_array(&to.scales, {heads, rows, static_cast<size_t>(shape.groups())});
  auto biases = make_array(&to.biases, {heads, rows, static_cast<size_t>(shape.groups())});
  {
    WithoutGil released;
    cache.read_codes(layer, length, keys, to);
  }
  return nb::make_tuple(codes, scales, biases);
}

void assign_codes(BoundCache& self, const std::vector<CodedRows>& keys, const std::vector<CodedRows>& values) {
  KvCache& cache = self.sequence->cache();
  const KvShape& shape = cache.shape();
  require_codes(cache);
  const size_t layers = static_cast<size_t>(shape.layers), heads = static_cast<size_t>(shape.kv_heads);
  if (keys.size() != layers || values.size() != layers)
    throw ShapeError("keys and values of " + std::to_string(layers) + " layers are needed, got " +
                     std::to_string(keys.size()) + " and " + std::to_string(values.size()));
  const size_t rows = std::get<0>(keys.front()).shape(1);
  const auto fits = [&](const auto& array, int32_t columns) {
    return array.shape(0) == heads && array.shape(1) == rows && array.shape(2) == static_cast<size_t>(columns);
  };
  for (const auto* list : {&keys, &values}) {
    for (const auto& [codes, scales, biases] : *list) {
      if (!fits(codes, shape.head_dim) || !fits(scales, shape.groups()) || !fits(biases, shape.groups()))
        throw ShapeError("codes must be (" + std::to_string(heads) + ", rows, " + std::to_string(shape.head_dim) +
                         "), scales and biases (" + std::to_string(heads) + ", rows, " +
                         std::to_string(shape.groups()) + ") with the same rows in all layers");
    }
  }
  CacheUse use(self);
  WithoutGil released;
  self.sequence->restart(static_cast<int64_t>(rows));
  for (int layer = 0; layer < shape.layers; layer++) {
    for (const bool of_keys : {true, false}) {
      const auto& [codes, scales, biases] = (of_keys ? keys : values)[static_cast<size_t>(layer)];
      // read only
      cache.write_codes(
          layer, static_cast<int64_t>(rows), of_keys,
          {const_cast<uint8_t*>(codes.data()), const_cast<float*>(scales.data()), const_cast<float*>(biases.data())});
    }
  }
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

nb::ndarray<nb::numpy, uint8_t> kv_bytes(BoundCache& self, int layer) {
  const KvCache& kv = self.sequence->cache();
  const KvShape& shape = kv.shape();
  if (layer < 0 || layer >= shape.layers)
    throw ShapeError("layer " + std::to_string(layer) + " is outside 0 to " + std::to_string(shape.layers - 1));
  CacheUse use(self);
  std::vector<int64_t> pages;
  for (int64_t page = 0; page * kPagePositions < kv.length() + kv.provisional(); page++) {
    if (kv.has_page(page, layer)) pages.push_back(page);
  }
  uint8_t* out;
  auto array = make_array(
      &out, {pages.size() * static_cast<size_t>(shape.kv_heads), shape.k_page_bytes() + shape.v_page_bytes()});
  for (const int64_t page : pages) {
    for (int head = 0; head < shape.kv_heads; head++) {
      const KvPage kv_page = kv.page(page, layer, head);
      out = std::copy_n(static_cast<const uint8_t*>(kv_page.k), shape.k_page_bytes(), out);
      out = std::copy_n(static_cast<const uint8_t*>(kv_page.v), shape.v_page_bytes(), out);
    }
  }
  return array;
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

  nb::class_<BoundCache>(
      m, "Cache",
      "Keys and values of one sequence, as a transaction: rows are appended provisionally, then "
      "committed or dropped.\n\n"
      "capacity 0 means the model's context. Memory is taken in pages of 256 positions when needed; "
      "layers with a\nwindow need no more of them than the window and the provisional rows.\n\n"
      "windows (layers,) replace the model's, 0 for none; a row then sees as many positions up to its "
      "own and the layer's\nsinks (layers,), which are first positions that never leave. The last "
      "undo committed positions can be dropped again.")
      .def("__init__", &init_cache, nb::arg("model"), nb::arg("capacity") = 0, nb::arg("windows") = nb::none(),
           nb::arg("sinks") = nb::none(), nb::arg("undo") = 0, nb::arg("kv_codes") = nb::none(), nb::keep_alive<1, 2>())
      .def_prop_ro(
          "length", [](const BoundCache& self) { return self.sequence->cache().length(); }, "Committed positions.")
      .def_prop_ro(
          "provisional", [](const BoundCache& self) { return self.sequence->cache().provisional(); },
          "Positions not yet committed.")
      .def_prop_ro("capacity", [](const BoundCache& self) { return self.sequence->cache().capacity(); })
      .def_prop_ro("nbytes", [](const BoundCache& self) { return self.sequence->cache().bytes(); })
      .def_prop_ro(
          "layer_rows", [](const BoundCache& self) { return self.sequence->layer_rows(); },
          "Layers run so far, each counted once for every row.")
      .def("kv_bytes", &kv_bytes, nb::arg("layer"),
           "A copy of a layer's keys and values as they lie in memory, (pages * kv heads, bytes) uint8: of the pages "
           "that a window has\nnot given up. Positions after the last hold anything.")
      .def(
          "commit",
          [](BoundCache& self, int64_t n) {
            CacheUse use(self);
            const int64_t provisional = self.sequence->cache().provisional();
            if (n < 0 || n > provisional)
              throw ShapeError("cannot commit " + std::to_string(n) + " rows: " + std::to_string(provisional) +
                               " are provisional");
            self.sequence->cache().commit(n);
          },
          nb::arg("n"), "Keeps the first n provisional rows and drops the rest.")
      .def(
          "rollback",
          [](BoundCache& self) {
            CacheUse use(self);
            self.sequence->cache().commit(0);
          },
          "Drops every provisional row.")
      .def(
          "keys",
          [](BoundCache& self, int layer, std::optional<int64_t> length) {
            return stored_rows(self, layer, length, true);
          },
          nb::arg("layer"), nb::arg("length") = nb::none(),
          nb::sig("def keys(self, layer: int, length: int | None = None) -> NDArray[numpy.float32] | "
                  "NDArray[numpy.uint16]"),
          "A copy of a layer's committed keys, rotated: (kv_heads, rows, head_dim), float32 or the bits of bf16.\n\n"
          "Rows are all positions or, of a layer with a window, its sinks and the last of the window's size. length "
          "reads as if\nthe cache had been truncated to it.")
      .def(
          "values",
          [](BoundCache& self, int layer, std::optional<int64_t> length) {
            return stored_rows(self, layer, length, false);
          },
          nb::arg("layer"), nb::arg("length") = nb::none(),
          nb::sig("def values(self, layer: int, length: int | None = None) -> NDArray[numpy.float32] | "
                  "NDArray[numpy.uint16]"),
          "A copy of a layer's committed values: (kv_heads, rows, head_dim), as for keys.")
      .def(
          "assign", &assign, nb::arg("keys"), nb::arg("values"), nb::arg("length") = nb::none(),
          nb::sig("def assign(self, keys: list[NDArray[numpy.float32]], values: list[NDArray[numpy.float32]], length: "
                  "int | None = None) -> None"),
          "Replaces what the cache holds by length positions, committed: rotated keys and values (kv_heads, rows, "
          "head_dim)\nfloat32 per layer, rounded to bf16 unless the precision is f32. Rows are all positions or, of a "
          "layer with a window,\nits sinks and the last ones, down to what the next row sees. Raises ContextFullError, "
          "or ShapeError.")
      .def("codes", &stored_codes, nb::arg("layer"), nb::arg("keys"), nb::arg("length") = nb::none(),
           nb::sig("def codes(self, layer: int, keys: bool, length: int | None = None) -> tuple[NDArray[numpy.uint8], "
                   "NDArray[numpy.float32], NDArray[numpy.float32]]"),
           "A copy of a layer's committed keys, or values, of a cache with kv_codes: codes (kv_heads, rows, head_dim), "
           "scales\nand biases (kv_heads, rows, groups). Raises ShapeError for other caches.")
      .def("assign_codes", &assign_codes, nb::arg("keys"), nb::arg("values"),
           nb::sig("def assign_codes(self, keys: list[tuple[NDArray[numpy.uint8], NDArray[numpy.float32], "
                   "NDArray[numpy.float32]]], values: list[tuple[NDArray[numpy.uint8], NDArray[numpy.float32], "
                   "NDArray[numpy.float32]]]) -> None"),
           "Replaces what a cache with kv_codes holds by rows per layer, as codes gives them, committed. Raises "
           "ContextFullError,\nor ShapeError.")
      .def_prop_ro(
          "least_length", [](const BoundCache& self) { return self.sequence->cache().least_length(); },
          "The least length, besides 0, that truncate allows.")
      .def(
          "truncate",
          [](BoundCache& self, int64_t length) {
            CacheUse use(self);
            if (length < 0 || length > self.sequence->cache().length())
              throw ShapeError("cannot truncate to " + std::to_string(length) + ": the cache holds " +
                               std::to_string(self.sequence->cache().length()));
            const int64_t least = self.sequence->cache().least_length();
            if (length > 0 && length < least)
              throw ShapeError("cannot truncate to " + std::to_string(length) +
                               ": the window has moved on, and the shortest possible length is " +
                               std::to_string(least) + ", or 0");
            self.sequence->cache().truncate(length);
          },
          nb::arg("length"), "Drops committed positions from the end, and everything provisional.");
}
