// Prompt lookup: the last few tokens of a growing text, at their latest earlier occurrence.
#pragma once

#include "seen_text.hpp"

namespace specfast {

/// An index of all runs of 1 to kLongestRun tokens (prompt lookup decoding, Saxena 2023). match() is the latest earlier
/// occurrence of the last kLongestRun tokens, else of fewer. A token costs constant time and at most 104 bytes.
class PromptLookup : public SeenText {
 public:
  static constexpr int kLongestRun = 3;

  /// Appends tokens (count,). The caller keeps length() + count within kLongest. After std::bad_alloc the index must
  /// not be used.
  void append(const int32_t* tokens, int64_t count);

  size_t bytes() const;

 private:
  /// The slot of the run of `length` tokens that ends at `end`: its own, or a free one.
  size_t slot_of(int32_t end, int32_t length) const;
  void grow_slots();

  struct Slot {
    int32_t end = -1;  // latest; -1 is free
    int32_t length = 0;
  };
  std::vector<Slot> slots_ = std::vector<Slot>(64);  // open addressing, a power of two
  size_t used_ = 0;
};

}  // namespace specfast
