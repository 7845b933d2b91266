// A forward pass as a plain C function, for hosts whose compiled graphs jump to it.
#include <cmath>
#include <limits>

#include "bindings.hpp"

using namespace specfast;

namespace {

/// One sequence of one model as a graph calls it, and what came of the calls.
struct GraphForward {
  nb::object model_owner, cache_owner;
  BoundCache* cache;
  std::string problem;
  int64_t calls = 0;

  void run(float* logits, const int32_t* tokens, int64_t start, int64_t M, int64_t rows) {
    CacheUse use(*cache);
    Sequence& sequence = *cache->sequence;
    const int64_t length = sequence.cache().length();
    if (start < 0 || start > length)
      throw ShapeError("start position " + std::to_string(start) + " is beyond the " + std::to_string(length) +
                       " positions in the cache; run the tokens before it first");
    if (M < 1 || rows < 1 || rows > M) throw ShapeError("a pass of " + std::to_string(M) + " tokens cannot be");
    const int64_t least = sequence.cache().least_length();
    if (start > 0 && start < least)
      throw ShapeError("start position " + std::to_string(start) + " is before " + std::to_string(least) +
                       ", the first that the window still allows");
    sequence.cache().truncate(start);
    sequence.forward(tokens, M, static_cast<int32_t>(rows), sequence.model().vocab, logits);
    sequence.cache().commit(M);
  }
};

/// A graph's call: `logits` (rows, vocab) float32, `state` (1,) int64, `tokens` (M,) int32, `call` (3,) int64: a
/// GraphForward, the rows wanted (0: all M), and M where it is fixed (0: the argument says). Logits that cannot be had
/// are NaN, and GraphForward::problem tells why: nothing may be thrown through the host.
extern "C" void specfast_graph_forward(float* logits, int64_t* state, const int32_t* tokens, const int64_t* call,
                                       int64_t start, int64_t variable_rows) noexcept {
  GraphForward& self = *reinterpret_cast<GraphForward*>(static_cast<intptr_t>(call[0]));
  const int64_t M = call[2] ? call[2] : variable_rows, rows = call[1] ? call[1] : M;
  self.calls++;
  *state = start + M;
  try {
    self.run(logits, tokens, start, M, rows);
    self.problem.clear();
  } catch (const std::exception& error) {
    std::fill_n(logits, rows * self.cache->sequence->model().vocab, std::numeric_limits<float>::quiet_NaN());
    self.problem = error.what();
  }
}

/// What a host checks its way of calling with: out[0] = in[0] + by, and out[1] counts the calls.
extern "C" void specfast_graph_probe(int32_t* out, const int32_t* in, int64_t by) noexcept {
  out[0] = in[0] + static_cast<int32_t>(by);
  out[1]++;
}

template <class Function>
uint64_t address_of(Function* function) {
  return static_cast<uint64_t>(reinterpret_cast<uintptr_t>(function));
}

}  // namespace

void bind_graph(nb::module_& m) {
  nb::class_<GraphForward>(
      m, "GraphForward",
      "A model's forward pass on a cache as a C function that a host's compiled graph calls.\n\n"
      "void f(float* logits, int64* state, const int32* tokens, const int64* call, int64 start, int64 M): truncates the "
      "cache\nto `start`, appends the tokens (M,), commits them, and writes the logits (rows, vocab) of the last rows. "
      "call is\n(address, rows or 0 for all, M or 0 where the argument says). It raises nothing: logits are NaN then, "
      "and `problem`\ntells why.")
      .def(
          "__init__",
          [](GraphForward* self, nb::object model, nb::object cache) {
            BoundCache& bound = nb::cast<BoundCache&>(cache);
            if (&bound.sequence->model() != nb::cast<BoundModel&>(model).model.get())
              throw ShapeError("this cache belongs to another model");
            new (self) GraphForward{std::move(model), std::move(cache), &bound, {}, 0};
          },
          nb::arg("model"), nb::arg("cache"), nb::sig("def __init__(self, model: Model, cache: Cache) -> None"))
      .def_prop_ro("address", [](GraphForward& self) { return address_of(&self); })
      .def_prop_ro_static("function", [](nb::handle) { return address_of(&specfast_graph_forward); })
      .def_prop_ro_static(
          "probe", [](nb::handle) { return address_of(&specfast_graph_probe); },
          "void f(int32* out, const int32* in, int64 by): out[0] = in[0] + by, and out[1] counts the calls.")
      .def_ro("problem", &GraphForward::problem, "What went wrong in the last call; empty if nothing did.")
      .def_ro("calls", &GraphForward::calls, "Calls so far.");
}
