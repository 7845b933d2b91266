// A hash table from runs of tokens to where they last ended.
#include "prompt_lookup.hpp"

namespace specfast {

size_t PromptLookup::bytes() const {
  return tokens_.capacity() * sizeof(int32_t) + slots_.capacity() * sizeof(Slot);
}

void PromptLookup::append(const int32_t* tokens, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const int32_t end = static_cast<int32_t>(tokens_.size());
    tokens_.push_back(tokens[i]);
    match_ = {};
    for (int32_t length = 1; length <= std::min(kLongestRun, end + 1); length++) {
      if (2 * (used_ + 1) > slots_.size()) grow_slots();
      Slot& slot = slots_[slot_of(end, length)];
      if (slot.end < 0)
        used_++;
      else
        match_ = {length, slot.end};
      slot = {end, length};
    }
  }
}

size_t PromptLookup::slot_of(int32_t end, int32_t length) const {
  const int32_t* run = tokens_.data() + end + 1 - length;
  uint64_t key = static_cast<uint64_t>(length);
  for (int32_t i = 0; i < length; i++) {
    key = (key ^ static_cast<uint32_t>(run[i])) * 0x9E3779B97F4A7C15u;
    key ^= key >> 32;
  }
  const size_t mask = slots_.size() - 1;
  for (size_t at = static_cast<size_t>(key) & mask;; at = (at + 1) & mask) {
    const Slot& slot = slots_[at];
    if (slot.end < 0) return at;
    if (slot.length == length && std::equal(run, run + length, tokens_.data() + slot.end + 1 - length)) return at;
  }
}

void PromptLookup::grow_slots() {
  std::vector<Slot> old(2 * slots_.size());
  old.swap(slots_);
  for (const Slot& slot : old) {
    if (slot.end >= 0) slots_[slot_of(slot.end, slot.length)] = slot;
  }
}

}  // namespace specfast
