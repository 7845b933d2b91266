// The suffix automaton of a growing text: its longest suffix that occurred before.
#pragma once

#include "seen_text.hpp"

namespace specfast {

/// Built online (Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text"), as suffix decoding
/// uses it (Hu et al. 2024, arXiv:2411.08294). match() is the longest suffix that ended before, at its last known end.
///
/// A token costs amortised constant time. n tokens have at most 2n states of 16 bytes and 3n edges of 16 bytes with at
/// most 12n slots of 4 bytes to find them: below 132 bytes a token, 216 where all vectors have just grown; source code
/// takes about 130 with that.
///
/// The end of a state is refreshed for the kRefreshed longest matches of every position, so a match of which more than
/// that many longer ones are alive is reported at an earlier end, never at a wrong one.
class SuffixAutomaton : public SeenText {
 public:
  static constexpr int kRefreshed = 16;

  SuffixAutomaton();

  /// Appends tokens (count,). The caller keeps length() + count within kLongest. After std::bad_alloc the automaton
  /// must not be used.
  void append(const int32_t* tokens, int64_t count);

  size_t bytes() const;

 private:
  struct State {
    int32_t length;      // of the longest string of the state
    int32_t link;        // state of the longest suffix that also occurs elsewhere; -1 at the root
    int32_t end;         // last known position where the state's strings end
    int32_t first_edge;  // list of edges; -1 when empty
  };
  struct Edge {
    int32_t from, token, to, next;
  };

  void append(int32_t token);
  int32_t add_state(const State& state);
  int32_t find(int32_t state, int32_t token) const;  // edge, or -1
  void add_edge(int32_t from, int32_t token, int32_t to);
  void grow_slots();
  size_t slot_of(int32_t state, int32_t token) const;

  std::vector<State> states_;
  std::vector<Edge> edges_;
  std::vector<int32_t> slots_;  // open addressing over edges, a power of two; -1 is free
  int32_t last_ = 0;            // state of the whole text
};

}  // namespace specfast
