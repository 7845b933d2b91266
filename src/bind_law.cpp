// Laws, draws and verification on NumPy arrays.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "bindings.hpp"
#include "couple_tokens.hpp"
#include "dispatch.hpp"
#include "random.hpp"
#include "verify_logits.hpp"

using namespace specfast;

Rule rule_named(const std::string& name) {
  if (name == "token") return Rule::token;
  if (name == "block") return Rule::block;
  if (name == "coupled") return Rule::coupled;
  throw ShapeError("unknown rule '" + name + "'; choose one of token, block, coupled");
}

namespace {

void init_law(Law* self, float temperature, int32_t top_k, float top_p, float min_p, int32_t vocab_limit,
              bool temper_last) {
  if (!(temperature >= 0.0f && temperature <= 100.0f))
    throw ShapeError("temperature must be in [0, 100], not " + std::to_string(temperature));
  if (top_k < 0) throw ShapeError("top_k must not be negative, not " + std::to_string(top_k));
  if (!(top_p > 0.0f && top_p <= 1.0f)) throw ShapeError("top_p must be in (0, 1], not " + std::to_string(top_p));
  if (!(min_p >= 0.0f && min_p <= 1.0f)) throw ShapeError("min_p must be in [0, 1], not " + std::to_string(min_p));
  if (vocab_limit < 0) throw ShapeError("vocab_limit must not be negative, not " + std::to_string(vocab_limit));
  new (self) Law{temperature, top_k, top_p, min_p, temper_last, vocab_limit};
}

using AnyArray = nb::ndarray<nb::ro, nb::device::cpu>;

/// The elements of an array that has `dimensions` axes, element type T and C order; throws ShapeError.
template <class T>
const T* elements_of(const AnyArray& array, size_t dimensions, const std::string& name, const char* type) {
  if (array.ndim() != dimensions)
    throw ShapeError(name + " must have " + std::to_string(dimensions) + " dimensions, not " +
                     std::to_string(array.ndim()));
  if (array.dtype() != nb::dtype<T>())
    throw ShapeError(name + " must be " + type + "; convert it with " + name + ".astype(numpy." + type + ")");
  int64_t stride = 1;
  for (size_t axis = dimensions; axis-- > 0;) {
    if (array.size() > 0 && array.shape(axis) > 1 && array.stride(axis) != stride)
      throw ShapeError(name + " must be C-contiguous; pass numpy.ascontiguousarray(" + name + ")");
    stride *= static_cast<int64_t>(array.shape(axis));
  }
  if (array.shape(dimensions - 1) > 0x7fffffff) throw ShapeError(name + " has more than 2^31 - 1 columns");
  return static_cast<const T*>(array.data());
}

nb::ndarray<nb::numpy, float> bound_law_rows(const AnyArray& logits, const Law& law,
                                             const std::optional<std::string>& isa) {
  const float* x = elements_of<float>(logits, 2, "logits", "float32");
  const LawLoops& loops = kernels_named(isa).law;
  const size_t M = logits.shape(0), V = logits.shape(1);
  float* p;
  auto out = make_array(&p, {M, V});
  {
    WithoutGil released;
    LawScratch scratch;
    for (size_t m = 0; m < M; m++)
      require_ok(law_row(loops, x + m * V, static_cast<int32_t>(V), NAN, law, p + m * V, scratch),
                 static_cast<int32_t>(m));
  }
  return out;
}

/// Whether a rule on given draws is the block rule; throws ShapeError.
bool by_block(const std::string& rule, double lenience) {
  const Rule named = rule_named(rule);
  if (named == Rule::coupled) throw ShapeError("the coupled rule has no draws u; call couple_tokens");
  if (named == Rule::block && lenience != 1.0)
    throw ShapeError("the block rule takes lenience 1, not " + std::to_string(lenience) + "; use the token rule");
  return named == Rule::block;
}

/// The arguments of the token rule, checked; `rows` are the target's laws or logits, `name` is what they are called.
struct RuleArguments {
  const float *rows, *q;
  const int32_t* tokens;
  const double* u;
  int32_t V, Vq, gamma;

  RuleArguments(const char* name, const AnyArray& target, const std::optional<AnyArray>& draft, const AnyArray& drafted,
                const AnyArray& draws, double lenience)
      : rows(elements_of<float>(target, 2, name, "float32")),
        q(draft ? elements_of<float>(*draft, 2, "q", "float32") : nullptr),
        tokens(elements_of<int32_t>(drafted, 1, "tokens", "int32")),
        u(elements_of<double>(draws, 1, "u", "float64")),
        V(static_cast<int32_t>(target.shape(1))),
        Vq(draft ? static_cast<int32_t>(draft->shape(1)) : 0),
        gamma(static_cast<int32_t>(drafted.shape(0))) {
    const size_t count = drafted.shape(0);
    const std::string given = " for " + std::to_string(gamma) + " tokens";
    if (target.shape(0) != count + 1)
      throw ShapeError(name + (" must have gamma + 1 rows" + given) + ", not " + std::to_string(target.shape(0)));
    if (draft && draft->shape(0) != count)
      throw ShapeError("q must have gamma rows" + given + ", not " + std::to_string(draft->shape(0)));
    if (draws.shape(0) != count + 1)
      throw ShapeError("u must have gamma + 1 draws" + given + ", not " + std::to_string(draws.shape(0)));
    if (!(lenience > 0.0)) throw ShapeError("lenience must be positive, not " + std::to_string(lenience));
    for (size_t i = 0; i < count; i++) {
      if (tokens[i] < 0 || tokens[i] >= V)
        throw ShapeError("token " + std::to_string(tokens[i]) + " is outside the vocabulary of " + std::to_string(V));
    }
    for (size_t i = 0; i <= count; i++) {
      if (!(u[i] >= 0.0 && u[i] < 1.0)) throw ShapeError("u must be in [0, 1), not " + std::to_string(u[i]));
    }
  }
};

std::pair<int32_t, int32_t> bound_verify_tokens(const AnyArray& p, const std::optional<AnyArray>& q,
                                                const AnyArray& tokens, const AnyArray& u, double lenience,
                                                const std::optional<std::string>& isa, const std::string& rule) {
  const RuleArguments a("p", p, q, tokens, u, lenience);
  const bool block = by_block(rule, lenience) && a.q;
  const LawLoops& loops = kernels_named(isa).law;
  WithoutGil released;
  const Verdict verdict = block ? verify_block(loops, a.rows, a.V, a.q, a.Vq, a.tokens, a.gamma, a.u)
                                : verify_tokens(loops, a.rows, a.V, a.q, a.Vq, a.tokens, a.gamma, a.u, lenience);
  if (verdict.next_token < 0) throw NumericalError("row " + std::to_string(verdict.tau) + " of p has no mass");
  return {verdict.tau, verdict.next_token};
}

std::pair<int32_t, int32_t> bound_verify_logits(const AnyArray& logits, const std::optional<AnyArray>& q,
                                                const AnyArray& tokens, const AnyArray& u, const Law& law,
                                                double lenience, const std::optional<std::string>& isa,
                                                const std::string& rule) {
  const RuleArguments a("logits", logits, q, tokens, u, lenience);
  const bool block = by_block(rule, lenience) && a.q;
  const LawLoops& loops = kernels_named(isa).law;
  WithoutGil released;
  thread_local VerifyScratch scratch;
  const Verdict verdict =
      block ? verify_logits_block(loops, false, a.rows, a.V, nullptr, law, a.q, a.Vq, a.tokens, a.gamma, a.u, scratch)
            : verify_logits(loops, false, a.rows, a.V, nullptr, law, a.q, a.Vq, a.tokens, a.gamma, a.u, lenience,
                            scratch);
  return {verdict.tau, verdict.next_token};
}

/// Tokens (gamma,) beside rows (gamma + 1, V), checked.
void require_rows(const char* name, size_t rows, const AnyArray& tokens) {
  if (rows != tokens.shape(0) + 1)
    throw ShapeError(name + std::string(" must have gamma + 1 rows for ") + std::to_string(tokens.shape(0)) +
                     " tokens, not " + std::to_string(rows));
}

std::pair<int32_t, int32_t> bound_couple_tokens(const AnyArray& p, const AnyArray& tokens, uint64_t seed,
                                                uint64_t position, const std::optional<std::string>& isa) {
  const float* laws = elements_of<float>(p, 2, "p", "float32");
  const int32_t* drafted = elements_of<int32_t>(tokens, 1, "tokens", "int32");
  require_rows("p", p.shape(0), tokens);
  const LawLoops& loops = kernels_named(isa).law;
  WithoutGil released;
  const Verdict verdict = couple_tokens(loops, laws, static_cast<int32_t>(p.shape(1)), drafted,
                                        static_cast<int32_t>(tokens.shape(0)), seed, position);
  if (verdict.next_token < 0) throw NumericalError("row " + std::to_string(verdict.tau) + " of p has no mass");
  return {verdict.tau, verdict.next_token};
}

std::pair<int32_t, int32_t> bound_couple_logits(const AnyArray& logits, const AnyArray& tokens, const Law& law,
                                                uint64_t seed, uint64_t position,
                                                const std::optional<std::string>& isa) {
  const float* x = elements_of<float>(logits, 2, "logits", "float32");
  const int32_t* drafted = elements_of<int32_t>(tokens, 1, "tokens", "int32");
  require_rows("logits", logits.shape(0), tokens);
  const LawLoops& loops = kernels_named(isa).law;
  WithoutGil released;
  thread_local VerifyScratch scratch;
  const Verdict verdict = couple_logits(loops, false, x, static_cast<int32_t>(logits.shape(1)), nullptr, law, drafted,
                                        static_cast<int32_t>(tokens.shape(0)), seed, position, scratch);
  return {verdict.tau, verdict.next_token};
}

int32_t bound_sample_token(const AnyArray& p, double u, const std::optional<std::string>& isa) {
  const float* law = elements_of<float>(p, 1, "p", "float32");
  if (!(u >= 0.0 && u < 1.0)) throw ShapeError("u must be in [0, 1), not " + std::to_string(u));
  const LawLoops& loops = kernels_named(isa).law;
  const int32_t V = static_cast<int32_t>(p.shape(0));
  WithoutGil released;
  const int32_t token = sample_token(loops, law, V, u);
  if (token < 0) throw NumericalError("p has no mass");
  return token;
}

/// The mask that a Python function gives for a text: bool (n,), bits in uint32 or int32 words, or None.
class PythonMask {
 public:
  PythonMask(const Adjustments& adjustments, nb::callable function)
      : adjustments_(adjustments), function_(std::move(function)) {}
  const std::vector<uint32_t>* operator()(const int32_t* drafted, int32_t count) {
    WithGil held;
    nb::list tokens;
    for (const int32_t token : adjustments_.text()) tokens.append(token);
    for (int32_t i = 0; i < count; i++) tokens.append(drafted[i]);
    const nb::object found = call(tokens);
    if (found.is_none()) return nullptr;
    AnyArray array;
    if (!nb::try_cast(found, array) || array.ndim() != 1)
      throw ShapeError("a mask must be None or a NumPy array of one dimension: bool, or bits in uint32 or int32 words");
    const size_t n = array.shape(0);
    if (array.dtype() == nb::dtype<uint32_t>() || array.dtype() == nb::dtype<int32_t>()) {
      const uint32_t* words = static_cast<const uint32_t*>(array.data());
      bits_.resize(n);
      for (size_t i = 0; i < n; i++) bits_[i] = words[static_cast<int64_t>(i) * array.stride(0)];
      return &bits_;
    }
    const bool* allowed = elements_of<bool>(array, 1, "mask", "bool");
    bits_.assign((n + 31) / 32, 0);
    for (size_t i = 0; i < n; i++) bits_[i / 32] |= static_cast<uint32_t>(allowed[i]) << (i % 32);
    return &bits_;
  }

 private:
  nb::object call(const nb::list& tokens) const {
    PyObject* found =
        enter_python([&] { return PyObject_CallFunctionObjArgs(function_.ptr(), tokens.ptr(), nullptr); });
    if (found) return nb::steal(found);
    if (!PyErr_ExceptionMatches(PyExc_Exception)) nb::raise_python_error();  // KeyboardInterrupt is not about the text
    try {
      nb::raise_python_error();
    } catch (...) {
      throw MaskError{std::current_exception()};
    }
  }

  const Adjustments& adjustments_;
  nb::callable function_;
  std::vector<uint32_t> bits_;
};

void init_adjustments(Adjustments* self, float repetition, float presence, float frequency, int64_t window,
                      int64_t prompt_length, const nb::dict& bias, const nb::object& mask,
                      const std::vector<int32_t>& ends) {
  if (!(repetition > 0.0f && repetition <= 100.0f))
    throw ShapeError("repetition_penalty must be above 0 and at most 100, not " + std::to_string(repetition));
  if (window < 0 || prompt_length < 0) throw ShapeError("penalty_window and prompt_length must not be negative");
  std::vector<std::pair<int32_t, float>> biases;
  for (const auto& [token, value] : bias) {
    biases.emplace_back(nb::cast<int32_t>(token), nb::cast<float>(value));
    if (biases.back().first < 0 || !(biases.back().second < INFINITY))
      throw ShapeError("logit_bias of token " + std::to_string(biases.back().first) + " is " +
                       std::to_string(biases.back().second) + "; ids start at 0, and biases are below infinity");
  }
  new (self) Adjustments();
  self->repetition = repetition;
  self->presence = presence;
  self->frequency = frequency;
  self->window = window;
  self->prompt_length = prompt_length;
  self->bias = std::move(biases);
  self->ends = ends;
  if (mask.is_none()) return;
  auto function = std::make_shared<PythonMask>(*self, nb::cast<nb::callable>(mask));
  self->mask = [function](const int32_t* drafted, int32_t count) { return (*function)(drafted, count); };
}

void bind_adjustments(nb::module_& m) {
  nb::class_<Adjustments>(m, "Adjustments",
                          "Edits of logits before the law, with the text they depend on; for target and draft of one "
                          "request.")
      .def("__init__", &init_adjustments, nb::kw_only(), nb::arg("repetition_penalty") = 1.0f,
           nb::arg("presence_penalty") = 0.0f, nb::arg("frequency_penalty") = 0.0f, nb::arg("penalty_window") = 0,
           nb::arg("prompt_length") = 0, nb::arg("logit_bias") = nb::dict(), nb::arg("mask") = nb::none(),
           nb::arg("ends") = std::vector<int32_t>())
      .def_prop_ro(
          "length", [](const Adjustments& self) { return self.text().size(); }, "Tokens of the text so far.")
      .def(
          "follow",
          [](Adjustments& self, const Tokens& tokens) {
            for (size_t i = 0; i < tokens.size(); i++) {
              if (tokens.data()[i] < 0) throw ShapeError("token " + std::to_string(tokens.data()[i]) + " is negative");
            }
            self.follow(tokens.data(), static_cast<int64_t>(tokens.size()));
          },
          nb::arg("tokens"), "Appends kept tokens (n,) int32, the prompt's first.")
      .def(
          "edit_rows",
          [](Adjustments& self, const AnyArray& logits, const AnyArray& drafted) {
            const float* x = elements_of<float>(logits, 2, "logits", "float32");
            const int32_t* tokens = elements_of<int32_t>(drafted, 1, "tokens", "int32");
            require_rows("logits", logits.shape(0), drafted);
            const LawLoops& loops = kernels_named({}).law;
            const int32_t M = static_cast<int32_t>(logits.shape(0)), V = static_cast<int32_t>(logits.shape(1));
            float* data;
            auto out = make_array(&data, {logits.shape(0), logits.shape(1)});
            std::copy_n(x, logits.size(), data);
            std::vector<int32_t> best;
            self.restart();
            for (int32_t m = 0; m < M; m++) {
              float* row = data + static_cast<size_t>(m) * logits.shape(1);
              RowMax top;
              top.value = loops.highest(row, V);
              top.index = argmax_row(loops, row, V);
              try {
                self.edit(loops, row, V, tokens, m, &top);
              } catch (const MaskError& error) {
                std::rethrow_exception(error.cause);
              }
              best.push_back(top.index);
            }
            return std::make_pair(out, best);
          },
          nb::arg("logits"), nb::arg("tokens"), "Edited logits (gamma + 1, V) float32, and the arg max of each row.");
}

}  // namespace

void bind_law(nb::module_& m) {
  nb::class_<Law>(
      m, "Law",
      "How logits become the law that is sampled: temperature, then top_k, top_p and min_p; 0 is greedy.\n\n"
      "temper_last truncates at temperature 1, top_p by the mass of all tokens, and then tempers (mlx-lm).")
      .def("__init__", &init_law, nb::arg("temperature") = 1.0f, nb::arg("top_k") = 0, nb::arg("top_p") = 1.0f,
           nb::arg("min_p") = 0.0f, nb::arg("vocab_limit") = 0, nb::arg("temper_last") = false)
      .def_ro("temperature", &Law::temperature)
      .def_ro("top_k", &Law::top_k)
      .def_ro("top_p", &Law::top_p)
      .def_ro("min_p", &Law::min_p)
      .def_ro("vocab_limit", &Law::vocab_limit)
      .def_ro("temper_last", &Law::temper_last);
  bind_adjustments(m);
  nb::class_<Proposal>(m, "Proposal",
                       "Drafted tokens and, where the drafter has them, their laws; the buffers are reused.")
      .def(nb::init<>())
      .def_prop_ro("gamma", &Proposal::gamma)
      .def_prop_ro(
          "tokens",
          [](const Proposal& self) {
            int32_t* data;
            auto out = make_array(&data, {self.tokens.size()});
            std::copy(self.tokens.begin(), self.tokens.end(), data);
            return out;
          },
          nb::rv_policy::move)
      .def_prop_ro("q",
                   [](const Proposal& self) -> nb::object {
                     if (self.q.empty()) return nb::none();
                     float* data;
                     auto out = make_array(&data, {self.tokens.size(), static_cast<size_t>(self.vocab)});
                     std::copy_n(self.q.begin(), self.tokens.size() * static_cast<size_t>(self.vocab), data);
                     return nb::cast(out);
                   })
      .def(
          "set_tokens",
          [](Proposal& self, const Tokens& tokens) {
            self.tokens.assign(tokens.data(), tokens.data() + tokens.size());
            self.q.clear();
          },
          nb::arg("tokens"), "Tokens of a drafter without a law (one-hot).");
  nb::class_<Verdict>(m, "Verdict", "tau drafted tokens are kept and next_token follows them.")
      .def(
          "__init__",
          [](Verdict* self, int32_t tau, int32_t next_token) {
            new (self) Verdict{};
            self->tau = tau;
            self->next_token = next_token;
          },
          nb::arg("tau"), nb::arg("next_token"))
      .def_ro("tau", &Verdict::tau)
      .def_ro("next_token", &Verdict::next_token);
  m.def("law_rows", &bound_law_rows, nb::arg("logits"), nb::arg("law"), nb::arg("isa") = nb::none(),
        "Probabilities (M, V) float32 of logits (M, V) float32; temperature 0 gives the arg max all mass.\n\n"
        "Raises ShapeError, or NumericalError on NaN, +infinity, or a row that allows no token.");
  m.def("verify_tokens", &bound_verify_tokens, nb::arg("p"), nb::arg("q").none(), nb::arg("tokens"), nb::arg("u"),
        nb::arg("lenience") = 1.0, nb::arg("isa") = nb::none(), nb::arg("rule") = "token",
        "How many of tokens (gamma,) int32 are kept, and the token that follows them; see specfast.ops.\n\n"
        "p: (gamma + 1, V) float32; q: (gamma, Vq) float32, or None for a drafter that was certain; u: (gamma + 1,)\n"
        "float64 in [0, 1), the last for the residual or bonus. Raises ShapeError, or NumericalError where p has no "
        "mass.");
  m.def("verify_logits", &bound_verify_logits, nb::arg("logits"), nb::arg("q").none(), nb::arg("tokens"), nb::arg("u"),
        nb::arg("law"), nb::arg("lenience") = 1.0, nb::arg("isa") = nb::none(), nb::arg("rule") = "token",
        "verify_tokens on the laws of logits (gamma + 1, V) float32, the same to the bit, without writing the laws.\n\n"
        "Rows that cannot matter are not looked at (after the first rejection, or after a token without target mass),\n"
        "nor is q where the law keeps a list of ids (top_k, or temperature 0) that does not hold them. Raises "
        "ShapeError,\n"
        "or NumericalError like law_rows for a row that is looked at.");
  m.def("couple_tokens", &bound_couple_tokens, nb::arg("p"), nb::arg("tokens"), nb::arg("seed"), nb::arg("position"),
        nb::arg("isa") = nb::none(),
        "The coupled rule on laws p (gamma + 1, V) float32, row i at position + i of the text; see specfast.ops.");
  m.def("couple_logits", &bound_couple_logits, nb::arg("logits"), nb::arg("tokens"), nb::arg("law"), nb::arg("seed"),
        nb::arg("position"), nb::arg("isa") = nb::none(),
        "couple_tokens on the laws of logits (gamma + 1, V) float32, without writing or normalising them.");
  m.def("noise", &noise_of, nb::arg("seed"), nb::arg("position"), nb::arg("token"),
        "A token's noise under the coupled rule: an exponential number, the same on every machine. The token with the\n"
        "least noise / p is chosen.");
  m.def(
      "noise_row",
      [](uint64_t seed, uint64_t position, int32_t count) {
        if (count < 1) throw ShapeError("a row of noise has at least 1 token, not " + std::to_string(count));
        float* row;
        auto out = make_array(&row, {static_cast<size_t>(count)});
        WithoutGil released;
        for (int32_t token = 0; token < count; token++)
          row[token] = static_cast<float>(noise_of(seed, position, token));
        return out;
      },
      nb::arg("seed"), nb::arg("position"), nb::arg("count"),
      "noise of the tokens below count, (count,) float32: for drafts that a host draws in its own graph.");
  m.def("sample_token", &bound_sample_token, nb::arg("p"), nb::arg("u"), nb::arg("isa") = nb::none(),
        "Inverse CDF of p (V,) float32 at u in [0, 1), in token order; never a token without mass.");
  m.def(
      "uniform",
      [](uint64_t seed, uint64_t round, uint32_t position, uint32_t purpose) {
        return uniform(seed, round, position, static_cast<Purpose>(purpose));
      },
      nb::arg("seed"), nb::arg("round"), nb::arg("position"), nb::arg("purpose"),
      "A draw in [0, 1) by Philox4x32-10, keyed by its arguments; purpose 0 drafts, 1 accepts, 2 draws residual or "
      "bonus.");
}
