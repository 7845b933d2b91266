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

/// Rows after the committed ones whose first layers are done: their keys and values of these layers lie in the cache,
/// whose lengths do not count the rows yet, and what the next layer reads is kept here.
struct EarlyRows {
  int32_t layers = 0;           // done; 0: there are no such rows
  int64_t position = 0;         // of the first row
  std::vector<int32_t> tokens;  // (rows,)
  std::vector<float> x;         // (rows, hidden), with room for those to come

  /// How many of `count` tokens from position `first` on are the first of these rows.
  int64_t known(int64_t first, const int32_t* wanted, int64_t count) const;
};

/// Consecutive rows on their way through layers [first_layer, last_layer), and the head if logits are wanted.
struct Stretch {
  const int32_t* tokens = nullptr;  // (count,), embedded first; null: the rows start from x
  float* x = nullptr;  // (count, hidden): taken where tokens is null, written unless null or logits come next
  int64_t count = 0;
  int64_t position = 0;  // of row 0
  int32_t first_layer = 0;
  int32_t last_layer = 0;
  int32_t logits_rows = 0;  // of the last rows; their maxima are over ids below `limit`
  int32_t limit = 0;
  float* logits = nullptr;  // (logits_rows, vocab), null: the sequence's own
};

/// The KV cache and buffers of one sequence of one model. Calls on one sequence must not overlap.
class Sequence {
 public:
  /// See KvCache; `shape` and `windows` are the model's or take their place.
  Sequence(std::shared_ptr<const Model> model, const KvShape& shape, const std::vector<Window>& windows,
           int64_t capacity, int64_t undo = 0);
  Sequence(const std::shared_ptr<const Model>& model, int64_t capacity)
      : Sequence(model, model->kv_shape(), model->windows(), capacity) {}

  const Model& model() const { return *model_; }
  KvCache& cache() { return cache_; }
  const KvCache& cache() const { return cache_; }

  /// Appends `count` tokens provisionally and writes the logits of the last `logits_rows` to `out` (logits_rows, vocab)
  /// or, if that is null, to logits(), and their maxima over ids below `limit` to best(). All or nothing: throws
  /// ContextFullError, ShapeError (token out of range) or std::bad_alloc with the cache as it was. Rows that
  /// draft_early began are continued where it left them.
  void forward(const int32_t* tokens, int64_t count, int32_t logits_rows, int32_t limit, float* out = nullptr);

  /// Appends `count` rows provisionally to the cache of a range of layers that is not a model's last. The rows are
  /// tokens where the range is first(), else they start from x (count, hidden); x receives what the next range starts
  /// from. A whole model cut into ranges gives the bits of one pass. All or nothing, as forward.
  void forward_range(const int32_t* tokens, float* x, int64_t count);

  /// As verify, for the last range of layers: the pending and drafted rows start from x (count + gamma, hidden), which
  /// may be written over.
  Verdict verify_range(float* x, int64_t count, const Proposal& proposal, const Law& law, double lenience,
                       uint64_t seed, uint64_t round, Rule rule = Rule::token);

  /// Forgets everything and counts `length` positions as committed, whose rows the caller then writes to the cache.
  /// Throws ContextFullError or std::bad_alloc with the cache emptied.
  void restart(int64_t length, const std::vector<int64_t>& held);
  void restart(int64_t length) { restart(length, std::vector<int64_t>(model_->layers.size())); }
  /// Replaces what the cache holds by `length` positions, committed. k[layer] and v[layer] are (kv_heads, rows[layer],
  /// head_dim): all positions or, of a layer with a window, its sinks and the last ones, down to what the next row
  /// sees. The cache rounds them to its format. Throws ContextFullError or std::bad_alloc with the cache emptied.
  void assign(int64_t length, const std::vector<int64_t>& rows, const float* const* k, const float* const* v);

  /// Appends and commits `pending`, then drafts gamma tokens; gamma - 1 of them stay provisional. Under the coupled
  /// rule they are chosen by the noise of their positions, and no laws are kept. `adjustments`, of the text that ends
  /// with `pending`, come before the law; the proposal is shorter where they leave nothing to draft, where their mask
  /// fails, and after an end token.
  void draft(const int32_t* pending, int64_t count, int32_t gamma, const Law& law, uint64_t seed, uint64_t round,
             Proposal& proposal, Rule rule = Rule::token, Adjustments* adjustments = nullptr);

  /// Drafts gamma tokens after `pending` from the model's first `layers` layers, its final norm and its head. Nothing
  /// is appended, but the rows' keys, values and hidden states are kept: a pass over the same tokens that comes next
  /// goes on from there, so that no layer runs twice for a row. Throws, with the cache as it was, also where the cache
  /// has no room for `pending` and gamma more.
  void draft_early(const int32_t* pending, int64_t count, int32_t gamma, int32_t layers, const Law& law, uint64_t seed,
                   uint64_t round, Proposal& proposal, Rule rule = Rule::token, Adjustments* adjustments = nullptr);

  /// Appends `count` tokens provisionally and gives, for each of `exits` (layer numbers, ascending), the mean over
  /// these rows of sum(min(p, q)): the chance that a token drawn after so many layers is accepted (Leviathan et al.
  /// 2022, Thm. 3.5, arXiv:2211.17192). All or nothing.
  std::vector<double> exit_acceptance(const int32_t* tokens, int64_t count, const std::vector<int32_t>& exits,
                                      const Law& law);

  /// Appends `pending` and the drafted tokens provisionally and decides by a rule, or greedily, what is kept. Without
  /// laws of the draft the block rule is the token rule, which then keeps as much. Lenience is the token rule's.
  /// `adjustments` as for draft: every row is edited as after its own prefix. A mask that fails on a row fails the call
  /// only if all tokens before the row are kept.
  Verdict verify(const int32_t* pending, int64_t count, const Proposal& proposal, const Law& law, double lenience,
                 uint64_t seed, uint64_t round, Rule rule = Rule::token, Adjustments* adjustments = nullptr);

  const float* logits() const { return work_.logits.data(); }
  const std::vector<RowMax>& best() const { return best_; }
  /// Rows times layers run so far.
  int64_t layer_rows() const { return layer_rows_; }

 private:
  int32_t layers() const { return static_cast<int32_t>(model_->layers.size()); }
  void require_tokens(const int32_t* tokens, int64_t count) const;
  /// Throws ShapeError unless the model has all layers.
  void require_whole() const;
  /// Appends rows that start from tokens, or from x where that is null, and runs them through all layers.
  void pass(const int32_t* tokens, float* x, int64_t count, int32_t logits_rows, int32_t limit);
  [[noreturn]] void throw_full(int64_t count) const;
  /// Takes room for `count` rows in the cache.
  void append(int64_t count);
  /// Makes room for the maxima of some rows of logits, and unless `elsewhere` for the logits.
  void reserve_logits(int32_t rows, bool elsewhere = false);
  /// Runs rows for which there is room in the cache, in tiles.
  void run(const Stretch& stretch);
  void tile(const Tile& tile, int32_t first_logits_row, int32_t limit, float* logits, RowMax* best);
  /// Drafts gamma tokens; read(tokens, count, logits_rows) puts tokens through the drafting layers. On an exception
  /// there is no proposal.
  template <class Read>
  void draft_with(const Read& read, const int32_t* pending, int64_t count, int32_t gamma, const Law& law, uint64_t seed,
                  uint64_t round, Proposal& proposal, Rule rule, Adjustments* adjustments);
  /// Writes the law of the last logits to q (vocab,) and draws from it.
  int32_t draw(const Law& law, double u, float* q);
  /// Whether small calls on this sequence keep to the calling thread.
  bool alone() const;
  void require_finite(int32_t rows) const;
  /// Edits the logits of every row that may decide, and their maxima. Returns how many drafted tokens are to be
  /// checked: none after an end token, nor after a text that the mask fails on or lets nothing follow. `failed` is then
  /// set if it failed. How many depends on these tokens alone, so that every rule stays exact.
  int32_t adjust(Adjustments& adjustments, const Proposal& proposal, int32_t limit, std::exception_ptr* failed);

  /// What a verdict is made of once the rows ran; `before` provisional rows are left where it throws.
  Verdict judge(const Proposal& proposal, int64_t before, int64_t position, const Law& law, double lenience,
                uint64_t seed, uint64_t round, Rule rule, Adjustments* adjustments);

  /// Decides about the first gamma drafted tokens by the last logits, of which row 0 is at `position` of the text.
  Verdict decide(const Proposal& proposal, int32_t gamma, int64_t position, const Law& law, double lenience,
                 uint64_t seed, uint64_t round, Rule rule);

  std::shared_ptr<const Model> model_;
  KvCache cache_;
  Workspace work_;
  std::vector<RowMax> best_;
  EarlyRows early_;
  int64_t layer_rows_ = 0;
  bool small_;
};

}  // namespace specfast
