// A text and where its end was seen before: what the ways to look it up share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace specfast {

/// Where the last tokens of a text occurred before.
struct Match {
  int32_t length = 0;  // tokens that are the same; 0 when the last token is new
  int32_t end = -1;    // position of the earlier occurrence's last token
};

/// A growing text of tokens, and the match of its end.
class SeenText {
 public:
  /// Most tokens a text may have, so that states and edges have 32-bit numbers.
  static constexpr int64_t kLongest = int64_t{1} << 29;

  int64_t length() const { return static_cast<int64_t>(tokens_.size()); }
  Match match() const { return match_; }

  /// Writes what followed the match, at most `max_tokens` of it and nothing if fewer than `min_match` tokens match.
  /// Where the earlier occurrence reaches into the end, the text goes on as if its period did.
  void continuation(int32_t max_tokens, int32_t min_match, std::vector<int32_t>& out) const {
    out.clear();
    if (match_.length < std::max(min_match, 1) || max_tokens < 1) return;
    const size_t next = static_cast<size_t>(match_.end) + 1, period = tokens_.size() - next;
    for (size_t i = 0; i < static_cast<size_t>(max_tokens); i++)
      out.push_back(i < period ? tokens_[next + i] : out[i - period]);
  }

 protected:
  std::vector<int32_t> tokens_;
  Match match_;
};

}  // namespace specfast
