// What the binding files share: array types, checks, and the Python side of the native objects.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
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

/// Python's identifier of the thread that ends it, set when the module is imported.
inline unsigned long main_thread = 0;

/// Makes a call that takes the interpreter lock or may give it up for a while. Where Python ends meanwhile, any thread
/// but the main one is a daemon and must not go on: CPython before 3.14 then unwinds its stack, which std::terminate
/// ends at the first noexcept function. Here it stops for ever instead, as CPython 3.14 has it. The main thread goes
/// on: it may be in the clean-up of an object that lived until the end. Nothing else is thrown through `call`.
template <class Call>
auto enter_python(const Call& call) {
  const auto stop = [] {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  };
  try {
    if (!Py_IsInitialized() && PyThread_get_thread_ident() != main_thread) stop();
    return call();
  } catch (...) {
    stop();  // within the handler: an unwinding like this may not be ended
    throw;
  }
}

/// A scope without the interpreter lock.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    enter_python([this] { PyEval_RestoreThread(state_); });
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

/// A scope with the interpreter lock, whether or not the thread has it.
class WithGil {
 public:
  WithGil() : state_(enter_python([] { return PyGILState_Ensure(); })) {}
  ~WithGil() { PyGILState_Release(state_); }
  WithGil(const WithGil&) = delete;
  WithGil& operator=(const WithGil&) = delete;

 private:
  PyGILState_STATE state_;
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
/// The shape with keys and values in MLX's affine codes.
specfast::KvShape affine_shape(specfast::KvShape shape, int32_t bits, int32_t group);
const specfast::KernelTable& kernels_named(const std::optional<std::string>& isa);

void bind_matrix(nb::module_& m);
void bind_model(nb::module_& m);
void bind_cache(nb::module_& m);
void bind_law(nb::module_& m);
void bind_machine(nb::module_& m);
void bind_ops(nb::module_& m);
void bind_drafters(nb::module_& m);
void bind_graph(nb::module_& m);
