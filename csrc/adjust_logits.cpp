// Sparse edits: only tokens seen or named are touched, and the maximum is searched again only where it was lowered.
#include "adjust_logits.hpp"

#include <algorithm>
#include <limits>

namespace specfast {
namespace {

constexpr float kForbidden = -std::numeric_limits<float>::infinity();

/// A row under edit and its maximum.
struct Row {
  float* x;
  int32_t limit;
  RowMax top;
  bool lost = false;  // the maximum was lowered: it is to be searched for

  void set(int32_t token, float value) noexcept {
    lost |= token == top.index && value < x[token];
    x[token] = value;
    if (!(value > top.value || (value == top.value && token < top.index))) return;
    top.value = value;
    top.index = token;
  }
  void forbid_all_but(const std::vector<uint32_t>& bits) noexcept {
    for (int32_t first = 0; first < limit; first += 32) {
      const size_t word = static_cast<size_t>(first / 32);
      const uint32_t allowed = word < bits.size() ? bits[word] : 0;
      for (int32_t i = first; allowed != ~0u && i < std::min(limit, first + 32); i++) {
        if (!(allowed >> (i - first) & 1)) x[i] = kForbidden;
      }
    }
    lost |= top.index >= 0 && x[top.index] != top.value;
  }
};

}  // namespace

int32_t Adjustments::token_at(int64_t i) const {
  const size_t at = static_cast<size_t>(i);
  return at < text_.size() ? text_[at] : drafted_[at - text_.size()];
}

void Adjustments::count(int64_t i, int32_t by) {
  const int32_t token = token_at(i);
  const size_t at = static_cast<size_t>(token);
  if (at >= seen_.size()) {
    seen_.resize(at + 1, -1);  // never counted
    generated_.resize(at + 1, 0);
  }
  if (seen_[at] < 0) {
    counted_.push_back(token);
    seen_[at] = 0;
  }
  seen_[at] += by;
  if (i >= prompt_length) generated_[at] += by;
}

void Adjustments::slide(int64_t i, int32_t by) {
  count(i, by);
  if (window > 0 && i >= window) count(i - window, -by);
}

void Adjustments::follow(const int32_t* tokens, int64_t n) {
  restart();
  for (int64_t i = 0; i < n; i++) {
    text_.push_back(tokens[i]);
    slide(static_cast<int64_t>(text_.size()) - 1, 1);
  }
}

void Adjustments::restart() {
  while (!drafted_.empty()) {
    slide(static_cast<int64_t>(text_.size() + drafted_.size()) - 1, -1);
    drafted_.pop_back();
  }
}

void Adjustments::edit(const LawLoops& loops, float* x, int32_t limit, const int32_t* drafted, int32_t n,
                       RowMax* best) {
  while (static_cast<int32_t>(drafted_.size()) < n) {
    drafted_.push_back(drafted[drafted_.size()]);
    slide(static_cast<int64_t>(text_.size() + drafted_.size()) - 1, 1);
  }
  Row row{x, limit, *best};
  for (const auto& [token, value] : bias) {
    if (token < limit) row.set(token, x[token] + value);
  }
  const bool penalised = repetition != 1.0f || presence != 0.0f || frequency != 0.0f;
  for (size_t c = 0; penalised && c < counted_.size(); c++) {
    const int32_t token = counted_[c];
    const size_t at = static_cast<size_t>(token);
    if (token >= limit || seen_[at] <= 0) continue;
    float value = x[token] > 0.0f ? x[token] / repetition : x[token] * repetition;
    if (generated_[at] > 0) {
      value -= presence;
      value -= frequency * static_cast<float>(generated_[at]);
    }
    row.set(token, value);
  }
  if (mask) {
    if (const std::vector<uint32_t>* bits = mask(drafted, n)) row.forbid_all_but(*bits);
  }
  if (row.lost) {
    row.top.value = loops.highest(x, limit);
    row.top.index = static_cast<int32_t>(std::find(x, x + limit, row.top.value) - x);
  }
  best->value = row.top.value;
  best->index = row.top.index;
}

}  // namespace specfast
