// Drafters that copy: the text so far, and what followed its end before.
#include <mutex>

#include "bindings.hpp"
#include "prompt_lookup.hpp"
#include "suffix_automaton.hpp"

using namespace specfast;

namespace {

/// A text and the lock that lets calls run without the interpreter's.
template <class Text>
struct BoundText {
  Text text;
  std::mutex mutex;
};

template <class Text>
nb::class_<BoundText<Text>> bind_text(nb::module_& m, const char* name, const char* doc) {
  using Bound = BoundText<Text>;
  return nb::class_<Bound>(m, name, doc)
      .def(nb::init<>())
      .def(
          "append",
          [](Bound& self, const Tokens& tokens) {
            WithoutGil released;
            std::lock_guard lock(self.mutex);
            if (self.text.length() + static_cast<int64_t>(tokens.size()) > Text::kLongest)
              throw ShapeError("a text of " + std::to_string(self.text.length()) + " tokens and " +
                               std::to_string(tokens.size()) + " more is longer than " +
                               std::to_string(Text::kLongest) + "; start a new one");
            self.text.append(tokens.data(), static_cast<int64_t>(tokens.size()));
          },
          nb::arg("tokens"), "Appends tokens (n,) int32, which are copied.")
      .def(
          "push",
          [](Bound& self, int32_t token) {
            std::lock_guard lock(self.mutex);
            if (self.text.length() >= Text::kLongest) throw ShapeError("the text is full; start a new one");
            self.text.append(&token, 1);
            return self.text.match().length;
          },
          nb::arg("token"), "Appends one token; returns match_length.")
      .def(
          "propose",
          [](Bound& self, int32_t max_tokens, int32_t min_match, Proposal& proposal) {
            std::lock_guard lock(self.mutex);
            proposal.q.clear();
            self.text.continuation(std::min(max_tokens, 64), min_match, proposal.tokens);
            return proposal.gamma();
          },
          nb::arg("max_tokens"), nb::arg("min_match"), nb::arg("proposal"),
          "Puts what followed the match into proposal, without laws (each token is certain), and returns how many "
          "tokens: max_tokens (at most 64), or 0 if fewer than min_match tokens match. A match that reaches the end "
          "goes on periodically.")
      .def_prop_ro(
          "match_length", [](const Bound& self) { return self.text.match().length; },
          "Tokens at the end that occurred before.")
      .def_prop_ro(
          "match_end", [](const Bound& self) { return self.text.match().end; },
          "Where the earlier occurrence ends; -1 without a match.")
      .def("__len__", [](const Bound& self) { return self.text.length(); })
      .def_prop_ro("nbytes", [](const Bound& self) { return self.text.bytes(); });
}

}  // namespace

void bind_drafters(nb::module_& m) {
  bind_text<SuffixAutomaton>(m, "SuffixAutomaton",
                             "The longest suffix of a growing text that occurred before, at its last known earlier "
                             "end. Amortised constant time a token, at most 216 bytes a token.");
  bind_text<PromptLookup>(m, "PromptLookup",
                          "The last 3 tokens of a growing text, else 2, else 1, at their latest earlier occurrence. "
                          "Constant time and at most 104 bytes a token.");
}
