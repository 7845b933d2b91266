// The token rule and the block rule from the target's logits: no law is written in full.
#pragma once

#include <algorithm>
#include <vector>

#include "law.hpp"
#include "types.hpp"
#include "verify_tokens.hpp"

namespace specfast {

/// Buffers of verify_logits, reused from call to call. Not shared between calls that overlap.
struct VerifyScratch {
  std::vector<LawScratch> laws;  // of each thread, or under the block rule of each row
  std::vector<RowLaw> rows;
  std::vector<float> weights;  // (V,) of one row; for the block rule
  std::vector<double> masses;  // (rows, Blocks::kMost); for the block rule
  SharedRow shared[2];

  /// Makes room for a number of laws over `vocab` ids.
  void reserve(int count, int32_t vocab, const Law& law) {
    const size_t size = static_cast<size_t>(count);
    laws.resize(std::max(laws.size(), size));
    for (size_t i = 0; !law.plain(vocab) && i < size; i++) laws[i].reserve(vocab);
  }
};

/// The verdict of verify_tokens on the laws of `logits` (gamma + 1, V) float32, the same to the bit. Threads share
/// every row of a plain law, and else take the rows in turn; rows after the first rejected token need not be finite.
///
/// `best` (gamma + 1,), if not null, holds the maximum of each row below the limit, so that rows are read once; q is
/// not read where a list that top-k keeps has no mass. The other arguments are those of verify_tokens. `alone` keeps to
/// the calling thread. Throws NumericalError if the last row read is not finite or allows no token, and std::bad_alloc.
Verdict verify_logits(const LawLoops& loops, bool alone, const float* logits, int32_t V, const RowMax* best,
                      const Law& law, const float* q, int32_t Vq, const int32_t* tokens, int32_t gamma, const double* u,
                      double lenience, VerifyScratch& scratch);

/// The verdict of verify_block on the laws of `logits`, the same to the bit; q is not null. Rows after a prefix whose c
/// is 0 are not looked at. The other arguments, and what is thrown, are those of verify_logits.
Verdict verify_logits_block(const LawLoops& loops, bool alone, const float* logits, int32_t V, const RowMax* best,
                            const Law& law, const float* q, int32_t Vq, const int32_t* tokens, int32_t gamma,
                            const double* u, VerifyScratch& scratch);

}  // namespace specfast
