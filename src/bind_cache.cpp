// Caches: keys and values of a sequence, read, replaced and rolled back from Python.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings.hpp"

using namespace specfast;

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

namespace {

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

}  // namespace

void bind_cache(nb::module_& m) {
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
