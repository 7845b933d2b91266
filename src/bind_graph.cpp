// A forward pass as a plain C function, for hosts whose compiled graphs jump to it.
#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>
#include <map>
#include <mutex>
#include <shared_mutex>

#include "bindings.hpp"

using namespace specfast;

namespace {

struct GraphForward;

/// The GraphForwards there are, by number: a captured graph may outlive the one that it calls.
class Registry {
 public:
  int64_t add(GraphForward* forward) {
    std::unique_lock lock(mutex_);
    forwards_[++last_] = forward;
    return last_;
  }
  void remove(int64_t number) {
    std::unique_lock lock(mutex_);
    forwards_.erase(number);
  }
  /// Calls use(forward) unless it is gone, and keeps it until that returns. Returns whether it was there.
  template <class Use>
  bool with(int64_t number, const Use& use) {
    std::shared_lock lock(mutex_);
    const auto found = forwards_.find(number);
    if (found == forwards_.end()) return false;
    use(*found->second);
    return true;
  }
  static Registry& instance() {
    static Registry& registry = *new Registry;  // a host may let go of models when the process ends
    return registry;
  }

 private:
  std::shared_mutex mutex_;
  std::map<int64_t, GraphForward*> forwards_;
  int64_t last_ = 0;
};

bool finite(const float* values, int64_t size) {
  uint32_t found = 0;  // an exponent of ones, of infinite values and NaN, overflows into the sign
  for (int64_t i = 0; i < size; i++) found |= (std::bit_cast<uint32_t>(values[i]) & 0x7f800000U) + 0x00800000U;
  return found < 0x80000000U;
}

/// One sequence of one model as a graph calls it, and what came of the calls.
struct GraphForward {
  nb::object model_owner, cache_owner;
  BoundCache* cache;
  int64_t number;
  std::string problem;
  int64_t calls = 0, last_call = 0;
  int64_t built = 0, computed = 0;  // number of the newest pass that the host has in a graph, and that has run

  /// A graph that the host captured knows nothing of the passes it was asked for since.
  void require_none_before(int64_t pass) const {
    if (pass <= computed && built > computed)
      throw ShapeError(
          "passes that were asked for before this one have not been computed: " + std::to_string(built - computed) +
          "; realise their logits before a captured graph is replayed, or ask for another pass");
  }

  GraphForward(nb::object model, nb::object cache_object)
      : model_owner(std::move(model)), cache_owner(std::move(cache_object)) {
    cache = &nb::cast<BoundCache&>(cache_owner);
    if (&cache->sequence->model() != nb::cast<BoundModel&>(model_owner).model.get())
      throw ShapeError("this cache belongs to another model");
    number = Registry::instance().add(this);
  }
  ~GraphForward() { Registry::instance().remove(number); }
  GraphForward(const GraphForward&) = delete;
  GraphForward& operator=(const GraphForward&) = delete;

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
    if (!finite(logits, rows * sequence.model().vocab))
      problem = "the logits are not finite; the weights hold NaN, or values too large for them";
  }
};

/// A graph's call: `logits` (rows, vocab) float32, what the call before wrote (not read here: an order), `tokens` (M,)
/// int32, `call` (6,) int64: the number of a GraphForward, the vocabulary, the rows wanted (0: all M), M and the start
/// position, of which -1 means the next of the two last arguments, and the pass's own number, 0 where it has none.
/// Logits that cannot be had are NaN, and GraphForward::problem tells why: nothing may be thrown through the host.
extern "C" void specfast_graph_forward(float* logits, const void*, const int32_t* tokens, const int64_t* call,
                                       int64_t first, int64_t second) noexcept {
  static std::atomic<int64_t> clock{0};
  const int64_t start = call[4] >= 0 ? call[4] : first, M = call[3] >= 0 ? call[3] : call[4] >= 0 ? first : second;
  const int64_t rows = call[2] ? call[2] : M;
  bool done = false;
  Registry::instance().with(call[0], [&](GraphForward& self) {
    self.calls++;
    self.last_call = ++clock;
    self.problem.clear();
    try {
      self.require_none_before(call[5]);
      self.run(logits, tokens, start, M, rows);
      done = true;
    } catch (const std::exception& error) {
      self.problem = error.what();
    }
    self.computed = std::max(self.computed, call[5]);
  });
  if (!done) std::fill_n(logits, rows * call[1], std::numeric_limits<float>::quiet_NaN());
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
      "void f(float* logits, const void* before, const int32* tokens, const int64* call, int64 a, int64 b): truncates "
      "the cache\nto `start`, appends the tokens (M,), commits them, and writes the logits (rows, vocab) of the last "
      "rows. call is\n(number, vocab, rows or 0 for all, M, start, pass), where -1 for M or start means the next of "
      "the "
      "last arguments, and\npass is the next number after `built`, or 0 for one without an order. It raises nothing: "
      "logits are NaN then, and\n`problem` tells why; so are those of one that is gone, and of a pass that runs again "
      "while passes of higher numbers\nwait.")
      .def(nb::init<nb::object, nb::object>(), nb::arg("model"), nb::arg("cache"),
           nb::sig("def __init__(self, model: Model, cache: Cache) -> None"))
      .def_ro("number", &GraphForward::number)
      .def_prop_ro_static("function", [](nb::handle) { return address_of(&specfast_graph_forward); })
      .def_prop_ro_static(
          "probe", [](nb::handle) { return address_of(&specfast_graph_probe); },
          "void f(int32* out, const int32* in, int64 by): out[0] = in[0] + by, and out[1] counts the calls.")
      .def_ro("problem", &GraphForward::problem, "What went wrong in the last call; empty if nothing did.")
      .def_ro("calls", &GraphForward::calls, "Calls so far.")
      .def_ro("last_call", &GraphForward::last_call,
              "The last one's number among the calls of all; 0 before the first.")
      .def_rw("built", &GraphForward::built, "The newest pass that the host has in a graph.");
}
