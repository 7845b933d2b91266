// Edits of logits before the law: a bias, penalties on tokens seen, and a mask of what may follow.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <utility>
#include <vector>

#include "law_loops.hpp"
#include "types.hpp"

namespace specfast {

/// A mask failed on a text. It fails the request only if the text is reached without drafted tokens being rejected.
struct MaskError {
  std::exception_ptr cause;
};

/// What a request edits, and the text it has seen; the row after drafted tokens sees those too.
///
/// In this order, which is mlx-lm's: biases are added; the logit of a token in the prompt or the text is divided by
/// `repetition` where it is positive and multiplied by it elsewhere (Keskar et al. 2019, arXiv:1909.05858); a generated
/// token's logit is lowered by `presence`, and by `frequency` times how often it was generated; then what the mask
/// forbids becomes -infinity. Only the last `window` tokens count, all if it is 0. Float32, the same on every machine.
class Adjustments {
 public:
  /// Bits of the tokens allowed after the text and `count` drafted tokens, ids beyond them forbidden; null allows all.
  /// Throws MaskError where it knows none.
  using Mask = std::function<const std::vector<uint32_t>*(const int32_t* drafted, int32_t count)>;

  float repetition = 1.0f, presence = 0.0f, frequency = 0.0f;
  int64_t window = 0;
  int64_t prompt_length = 0;
  std::vector<std::pair<int32_t, float>> bias;
  Mask mask;
  std::vector<int32_t> ends;  // tokens that end the text: what comes after them is never edited

  bool ended_by(int32_t token) const noexcept { return std::find(ends.begin(), ends.end(), token) != ends.end(); }

  /// The tokens that were kept so far, the prompt first.
  const std::vector<int32_t>& text() const noexcept { return text_; }
  /// Appends kept tokens, none of them negative.
  void follow(const int32_t* tokens, int64_t count);

  /// Forgets drafted tokens, before the first row of a round.
  void restart();
  /// Edits the row after `count` drafted tokens, one more than for the row before; ids from `limit` on stay as they
  /// are. `best`, the row's maximum below the limit, follows.
  void edit(const LawLoops& loops, float* x, int32_t limit, const int32_t* drafted, int32_t count, RowMax* best);

 private:
  int32_t token_at(int64_t i) const;
  /// Counts token i of text and draft, and no longer the one that leaves the window; or takes that back.
  void slide(int64_t i, int32_t by);
  void count(int64_t i, int32_t by);

  std::vector<int32_t> text_, drafted_;
  std::vector<int32_t> seen_, generated_;  // by token, within the window
  std::vector<int32_t> counted_;           // every token that ever was, once
};

}  // namespace specfast
