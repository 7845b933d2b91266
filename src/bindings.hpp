// What the binding files share: array types, checks, and the Python side of the native objects.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "decoder.hpp"
#include "errors.hpp"

namespace nb = nanobind;

using Bytes = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Doubles = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Tokens = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

/// A matrix and the arrays that own its memory.
struct BoundMatrix {
  specfast::Matrix matrix;
  std::vector<Bytes> owners;
};

/// A model and everything that owns its memory.
struct BoundModel {
  std::shared_ptr<const specfast::Model> model;
  std::vector<BoundMatrix> owners;
};

/// A sequence, and whether a native call is running on it.
struct BoundCache {
  std::unique_ptr<specfast::Sequence> sequence;
  std::atomic<bool> busy{false};
};

/// Marks a cache as in use for the length of a native call, which runs without the interpreter lock.
class CacheUse {
 public:
  explicit CacheUse(BoundCache& cache) : cache_(cache) {
    if (cache_.busy.exchange(true))
      throw specfast::ShapeError("this cache is in use by another thread; give every thread its own");
  }
  ~CacheUse() { cache_.busy = false; }

 private:
  BoundCache& cache_;
};

/// A NumPy array (rows, columns) that owns a new buffer; returns the buffer.
template <class T>
nb::ndarray<nb::numpy, T> make_array(T** data, std::initializer_list<size_t> shape) {
  size_t size = 1;
  for (size_t extent : shape) size *= extent;
  *data = new T[size ? size : 1]();
  nb::capsule owner(*data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::ndarray<nb::numpy, T>(*data, shape, owner);
}

specfast::Format format_named(const std::string& name);
specfast::Precision precision_named(const std::string& name);
specfast::Rule rule_named(const std::string& name);
const char* precision_name(specfast::Precision precision);
const specfast::KernelTable& kernels_named(const std::optional<std::string>& isa);

void bind_matrix(nb::module_& m);
void bind_model(nb::module_& m);
void bind_law(nb::module_& m);
void bind_machine(nb::module_& m);
void bind_ops(nb::module_& m);
void bind_drafters(nb::module_& m);
