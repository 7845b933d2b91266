// States, edges and suffix links, one token at a time.
#include "suffix_automaton.hpp"

namespace specfast {

SuffixAutomaton::SuffixAutomaton() : states_{{0, -1, -1, -1}}, slots_(64, -1) {}

size_t SuffixAutomaton::bytes() const {
  return tokens_.capacity() * sizeof(int32_t) + states_.capacity() * sizeof(State) + edges_.capacity() * sizeof(Edge) +
         slots_.capacity() * sizeof(int32_t);
}

void SuffixAutomaton::append(const int32_t* tokens, int64_t count) {
  for (int64_t i = 0; i < count; i++) append(tokens[i]);
}

void SuffixAutomaton::append(int32_t token) {
  const int32_t position = static_cast<int32_t>(tokens_.size());
  // The position before this one becomes an earlier end only now, when it no longer is the text's own.
  int32_t state = last_;
  for (int i = 0; i < kRefreshed && state > 0; i++, state = states_[static_cast<size_t>(state)].link)
    states_[static_cast<size_t>(state)].end = position - 1;

  tokens_.push_back(token);
  const int32_t whole = add_state({position + 1, 0, position, -1});
  int32_t from = last_;
  int32_t edge = -1;
  for (; from >= 0; from = states_[static_cast<size_t>(from)].link) {
    edge = find(from, token);
    if (edge >= 0) break;
    add_edge(from, token, whole);
  }
  if (from >= 0) {
    const int32_t to = edges_[static_cast<size_t>(edge)].to;
    int32_t suffix = to;
    const int32_t length = states_[static_cast<size_t>(from)].length + 1;
    if (states_[static_cast<size_t>(to)].length != length) {
      // Strings of `to` up to this length now end here too, the longer ones do not.
      State shorter = states_[static_cast<size_t>(to)];
      shorter.length = length;
      shorter.first_edge = -1;
      suffix = add_state(shorter);
      for (int32_t e = states_[static_cast<size_t>(to)].first_edge; e >= 0; e = edges_[static_cast<size_t>(e)].next)
        add_edge(suffix, edges_[static_cast<size_t>(e)].token, edges_[static_cast<size_t>(e)].to);
      states_[static_cast<size_t>(to)].link = suffix;
      for (; from >= 0; from = states_[static_cast<size_t>(from)].link) {
        edge = find(from, token);
        if (edge < 0 || edges_[static_cast<size_t>(edge)].to != to) break;
        edges_[static_cast<size_t>(edge)].to = suffix;
      }
    }
    states_[static_cast<size_t>(whole)].link = suffix;
  }
  last_ = whole;
  const State& longest = states_[static_cast<size_t>(states_[static_cast<size_t>(whole)].link)];
  match_ = {longest.length, longest.length ? longest.end : -1};
}

int32_t SuffixAutomaton::add_state(const State& state) {
  states_.push_back(state);
  return static_cast<int32_t>(states_.size()) - 1;
}

size_t SuffixAutomaton::slot_of(int32_t state, int32_t token) const {
  uint64_t key = (static_cast<uint64_t>(static_cast<uint32_t>(state)) << 32) | static_cast<uint32_t>(token);
  key *= 0x9E3779B97F4A7C15u;
  key ^= key >> 32;
  key *= 0xD6E8FEB86659FD93u;
  return static_cast<size_t>(key >> 32) & (slots_.size() - 1);
}

int32_t SuffixAutomaton::find(int32_t state, int32_t token) const {
  for (size_t slot = slot_of(state, token);; slot = (slot + 1) & (slots_.size() - 1)) {
    const int32_t edge = slots_[slot];
    if (edge < 0) return -1;
    const Edge& found = edges_[static_cast<size_t>(edge)];
    if (found.from == state && found.token == token) return edge;
  }
}

void SuffixAutomaton::add_edge(int32_t from, int32_t token, int32_t to) {
  if (2 * (edges_.size() + 1) > slots_.size()) grow_slots();
  const int32_t edge = static_cast<int32_t>(edges_.size());
  edges_.push_back({from, token, to, states_[static_cast<size_t>(from)].first_edge});
  states_[static_cast<size_t>(from)].first_edge = edge;
  size_t slot = slot_of(from, token);
  while (slots_[slot] >= 0) slot = (slot + 1) & (slots_.size() - 1);
  slots_[slot] = edge;
}

void SuffixAutomaton::grow_slots() {
  slots_.assign(2 * slots_.size(), -1);
  for (size_t edge = 0; edge < edges_.size(); edge++) {
    size_t slot = slot_of(edges_[edge].from, edges_[edge].token);
    while (slots_[slot] >= 0) slot = (slot + 1) & (slots_.size() - 1);
    slots_[slot] = static_cast<int32_t>(edge);
  }
}

}  // namespace specfast
