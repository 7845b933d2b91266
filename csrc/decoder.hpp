// A sequence over a model: forward passes, drafting and verifying, each one native call.
#pragma once

#include <memory>

#include "adjust_logits.hpp"
#include "kv_cache.hpp"
#include "workspace.hpp"

namespace specfast {

/// Drafted tokens and, where the drafter has them, the laws they were drawn from. Buffers are reused.
struct Proposal {
  std::vector<int32_t> tokens;  // (gamma,)
  std::vector<float> q;         // (gamma, vocab) or empty
  int32_t vocab = 0;

  int32_t gamma() const { return static_cast<int32_t>(tokens.size()); }
};

/// The KV cache and buffers of one sequence of one model. Calls on one sequence must not overlap.
class Sequence {
 public:
  Sequence(std::shared_ptr<const Model> model, int64_t capacity);

  const Model& model() const { return *model_; }
  KvCache& cache() { return cache_; }
  const KvCache& cache() const { return cache_; }

  /// Appends `count` tokens provisionally and leaves the logits of the last `logits_rows` in work().logits with their
  /// maxima over ids below `limit` in `best`. All or nothing: throws ContextFullError, ShapeError (token out of range)
  /// or std::bad_alloc with the cache as it was.
  void forward(const int32_t* tokens, int64_t count, int32_t logits_rows, int32_t limit);

  /// Appends and commits `pending`, then drafts gamma tokens; gamma - 1 of them stay provisional. Under the coupled
  /// rule they are chosen by the noise of their positions, and no laws are kept. `adjustments`, of the text that ends
  /// with `pending`, come before the law; where they leave nothing to draft the proposal is shorter.
  void draft(const int32_t* pending, int64_t count, int32_t gamma, const Law& law, uint64_t seed, uint64_t round,
             Proposal& proposal, Rule rule = Rule::token, Adjustments* adjustments = nullptr);

  /// Appends `pending` and the drafted tokens provisionally and decides by a rule, or greedily, what is kept. Without
  /// laws of the draft the block rule is the token rule, which then keeps as much. Lenience is the token rule's.
  /// `adjustments` as for draft: every row is edited as after its own prefix.
  Verdict verify(const int32_t* pending, int64_t count, const Proposal& proposal, const Law& law, double lenience,
                 uint64_t seed, uint64_t round, Rule rule = Rule::token, Adjustments* adjustments = nullptr);

  const float* logits() const { return work_.logits.data(); }
  const std::vector<RowMax>& best() const { return best_; }

 private:
  void tile(const Tile& tile, int32_t first_logits_row, int32_t limit, float* logits, RowMax* best);
  /// Writes the law of the last logits to q (vocab,) and draws from it.
  int32_t draw(const Law& law, double u, float* q);
  /// Whether small calls on this sequence keep to the calling thread.
  bool alone() const;
  void require_finite(int32_t rows) const;
  /// Edits the logits of every row that may decide, and their maxima.
  void adjust(Adjustments& adjustments, const Proposal& proposal, int32_t limit);

  std::shared_ptr<const Model> model_;
  KvCache cache_;
  Workspace work_;
  std::vector<RowMax> best_;
  bool small_;  // a pass is over before a second thread would have helped much
};

}  // namespace specfast
