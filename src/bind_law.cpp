// Laws, draws and verification on NumPy arrays.
#include "bindings.hpp"
#include "dispatch.hpp"
#include "random.hpp"

#include <nanobind/stl/pair.h>

using namespace specfast;

namespace {

void init_law(Law* self, float temperature, int32_t top_k, float top_p, float min_p, int32_t vocab_limit) {
  if (!(temperature >= 0.0f && temperature <= 100.0f)) throw ShapeError("temperature must be in [0, 100], not " + std::to_string(temperature));
  if (top_k < 0) throw ShapeError("top_k must not be negative, not " + std::to_string(top_k));
  if (!(top_p > 0.0f && top_p <= 1.0f)) throw ShapeError("top_p must be in (0, 1], not " + std::to_string(top_p));
  if (!(min_p >= 0.0f && min_p <= 1.0f)) throw ShapeError("min_p must be in [0, 1], not " + std::to_string(min_p));
  if (vocab_limit < 0) throw ShapeError("vocab_limit must not be negative, not " + std::to_string(vocab_limit));
  new (self) Law{temperature, top_k, top_p, min_p, vocab_limit};
}

nb::ndarray<nb::numpy, float> bound_law_rows(const Floats& logits, const Law& law, const std::optional<std::string>& isa) {
  if (logits.ndim() != 2) throw ShapeError("logits must be (M, V)");
  if (law.greedy()) throw ShapeError("temperature 0 is greedy and has no law; take the arg max");
  const size_t M = logits.shape(0), V = logits.shape(1);
  float* p;
  auto out = make_array(&p, {M, V});
  LawScratch scratch;
  for (size_t m = 0; m < M; m++) {
    const LawStatus status = law_row(kernels_named(isa), logits.data() + m * V, static_cast<int32_t>(V), law, p + m * V, scratch);
    if (status == LawStatus::not_finite) throw NumericalError("logits of row " + std::to_string(m) + " hold NaN or +infinity");
    if (status == LawStatus::empty) throw NumericalError("every logit of row " + std::to_string(m) + " is -infinity: no token is allowed");
  }
  return out;
}

std::pair<int32_t, int32_t> bound_verify_tokens(const Floats& p, const std::optional<Floats>& q, const Tokens& tokens, const Doubles& u,
                                                double lenience) {
  const size_t gamma = tokens.shape(0);
  if (p.ndim() != 2 || p.shape(0) != gamma + 1)
    throw ShapeError("p must be (gamma + 1, V) with gamma = " + std::to_string(gamma) + " tokens");
  if (q && (q->ndim() != 2 || q->shape(0) != gamma)) throw ShapeError("q must be (gamma, V) with gamma = " + std::to_string(gamma));
  if (u.shape(0) != gamma + 1) throw ShapeError("u must be (gamma + 1,), not (" + std::to_string(u.shape(0)) + ",)");
  if (!(lenience > 0.0)) throw ShapeError("lenience must be positive, not " + std::to_string(lenience));
  const int32_t V = static_cast<int32_t>(p.shape(1));
  for (size_t i = 0; i < gamma; i++) {
    if (tokens.data()[i] < 0 || tokens.data()[i] >= V)
      throw ShapeError("token " + std::to_string(tokens.data()[i]) + " is outside the vocabulary of " + std::to_string(V));
  }
  for (size_t i = 0; i <= gamma; i++) {
    if (!(u.data()[i] >= 0.0 && u.data()[i] < 1.0)) throw ShapeError("u must be in [0, 1), not " + std::to_string(u.data()[i]));
  }
  const Verdict verdict = verify_tokens(p.data(), V, q ? q->data() : nullptr, q ? static_cast<int32_t>(q->shape(1)) : 0, tokens.data(),
                                        static_cast<int32_t>(gamma), u.data(), lenience);
  if (verdict.next_token < 0) throw NumericalError("row " + std::to_string(verdict.tau) + " of p has no mass");
  return {verdict.tau, verdict.next_token};
}

int32_t bound_sample_token(const Floats& p, double u) {
  const int32_t token = sample_token(p.data(), static_cast<int32_t>(p.size()), u);
  if (token < 0) throw NumericalError("p has no mass");
  return token;
}

}  // namespace

void bind_law(nb::module_& m) {
  nb::class_<Law>(m, "Law", "How logits become the law that is sampled: temperature, then top_k, top_p and min_p; 0 is greedy.")
      .def("__init__", &init_law, nb::arg("temperature") = 1.0f, nb::arg("top_k") = 0, nb::arg("top_p") = 1.0f, nb::arg("min_p") = 0.0f,
           nb::arg("vocab_limit") = 0)
      .def_ro("temperature", &Law::temperature)
      .def_ro("top_k", &Law::top_k)
      .def_ro("top_p", &Law::top_p)
      .def_ro("min_p", &Law::min_p)
      .def_ro("vocab_limit", &Law::vocab_limit);
  nb::class_<Proposal>(m, "Proposal", "Drafted tokens and, where the drafter has them, their laws; the buffers are reused.")
      .def(nb::init<>())
      .def_prop_ro("gamma", &Proposal::gamma)
      .def_prop_ro("tokens",
                   [](const Proposal& self) {
                     int32_t* data;
                     auto out = make_array(&data, {self.tokens.size()});
                     std::copy(self.tokens.begin(), self.tokens.end(), data);
                     return out;
                   })
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
      .def_ro("tau", &Verdict::tau)
      .def_ro("next_token", &Verdict::next_token);
  m.def("law_rows", &bound_law_rows, nb::arg("logits"), nb::arg("law"), nb::arg("isa") = nb::none(), "Probabilities (M, V) of logits (M, V).");
  m.def("verify_tokens", &bound_verify_tokens, nb::arg("p"), nb::arg("q").none(), nb::arg("tokens"), nb::arg("u"), nb::arg("lenience") = 1.0,
        "The token rule on laws p (gamma + 1, V) and q (gamma, V) or None; returns (tau, next_token).");
  m.def("sample_token", &bound_sample_token, nb::arg("p"), nb::arg("u"), "Inverse CDF of p (V,) at u, in token order.");
  m.def(
      "uniform",
      [](uint64_t seed, uint64_t round, uint32_t position, uint32_t purpose) { return uniform(seed, round, position, static_cast<Purpose>(purpose)); },
      nb::arg("seed"), nb::arg("round"), nb::arg("position"), nb::arg("purpose"), "A counter-based draw in [0, 1).");
}
