// The fused decoder: a tile of rows through all layers in one parallel call.
#include "decoder.hpp"

#include <algorithm>
#include <limits>

#include "attend_rows.hpp"
#include "couple_tokens.hpp"
#include "errors.hpp"
#include "random.hpp"
#include "regions.hpp"
#include "thread_pool.hpp"

namespace specfast {

Sequence::Sequence(std::shared_ptr<const Model> model, const KvShape& shape, const std::vector<Window>& windows,
                   int64_t capacity, int64_t undo)
    : model_(std::move(model)), cache_(shape, windows, capacity, undo), work_(*model_), small_(model_->is_small()) {}

int64_t EarlyRows::known(int64_t first, const int32_t* wanted, int64_t count) const {
  if (layers == 0 || first != position) return 0;
  const int64_t most = std::min(count, static_cast<int64_t>(tokens.size()));
  return std::mismatch(tokens.begin(), tokens.begin() + most, wanted).first - tokens.begin();
}

void Sequence::tile(const Tile& tile, int32_t first_logits_row, int32_t limit, float* logits, RowMax* best) {
  const Model& model = *model_;
  ThreadPool& pool = ThreadPool::instance();
  const size_t partial = Attention::partial_floats(cache_, model.heads, tile.M, tile.position);
  if (work_.partial.size() < partial) work_.partial.resize(partial);
  const KvShape& shape = cache_.shape();
  const size_t floats = shape.format == KvFormat::affine ? shape.wide_page_floats() : 0;
  const auto prepare = [&](int threads) { work_.reserve(model, threads, floats); };
  pool.run(alone(), prepare, [&](const Team& team) {
    const Pass pass{team, model, work_, cache_, tile};
    rope_angles(pass);
    if (tile.tokens) embed_rows(pass);
    for (int layer = tile.first_layer; layer < tile.last_layer; layer++) {
      const LayerWeights& w = model.layers[static_cast<size_t>(layer)];
      qkv_rope_append(pass, layer);
      attend_rows(pass, layer);
      project_rows(pass, w.o, work_.attended);
      swiglu_rows(pass, layer);
      project_rows(pass, w.down, work_.activated);
    }
    if (first_logits_row < tile.M) logits_rows(pass, first_logits_row, limit, logits, best);
  });
  layer_rows_ += int64_t{tile.M} * (tile.last_layer - tile.first_layer);
}

bool Sequence::alone() const {
  // Barriers of a pass this short cost more on a busy machine than its threads gain.
  return small_ && !ThreadPool::instance().size_was_set();
}

void Sequence::run(const Stretch& s) {
  const size_t hidden = static_cast<size_t>(model_->hidden);
  const int64_t first_logits = s.count - s.logits_rows;
  float* logits = s.logits ? s.logits : work_.logits.data();
  for (int64_t done = 0; done < s.count; done += kTileRows) {
    const int32_t M = static_cast<int32_t>(std::min<int64_t>(kTileRows, s.count - done));
    float* x = s.x ? s.x + static_cast<size_t>(done) * hidden : nullptr;
    const size_t elements = static_cast<size_t>(M) * hidden;
    if (!s.tokens) std::copy_n(x, elements, work_.x.data());
    const int64_t wanted = std::max(first_logits, done);  // the tile's first row whose logits are wanted
    const size_t slot = wanted < done + M ? static_cast<size_t>(wanted - first_logits) : 0;
    tile({s.tokens ? s.tokens + done : nullptr, M, s.position + done, s.first_layer, s.last_layer},
         static_cast<int32_t>(std::min<int64_t>(wanted - done, M)), s.limit,
         logits + slot * static_cast<size_t>(model_->vocab), best_.data() + slot);
    if (x && !(s.last_layer == layers() && model_->last())) std::copy_n(work_.x.data(), elements, x);
  }
}

void Sequence::require_whole() const {
  if (!model_->first() || !model_->last())
    throw ShapeError("this needs all layers of a model, and this one has a range of them");
}

void Sequence::require_tokens(const int32_t* tokens, int64_t count) const {
  for (int64_t i = 0; i < count; i++) {
    if (tokens[i] < 0 || tokens[i] >= model_->vocab)
      throw ShapeError("token " + std::to_string(tokens[i]) + " is outside the vocabulary of " +
                       std::to_string(model_->vocab));
  }
}

void Sequence::throw_full(int64_t count) const {
  throw ContextFullError("the context holds " + std::to_string(cache_.capacity()) + " tokens; " +
                         std::to_string(cache_.length() + cache_.provisional()) + " are in it and " +
                         std::to_string(count) + " more were asked for");
}

void Sequence::append(int64_t count) {
  if (!cache_.append(count)) throw_full(count);
}

void Sequence::reserve_logits(int32_t rows, bool elsewhere) {
  const size_t needed = elsewhere ? 0 : static_cast<size_t>(rows) * static_cast<size_t>(model_->vocab);
  work_.logits.resize(std::max(work_.logits.size(), needed));
  best_.assign(static_cast<size_t>(rows), RowMax{});
}

void Sequence::forward(const int32_t* tokens, int64_t count, int32_t logits_rows, int32_t limit, float* out) {
  require_whole();
  require_tokens(tokens, count);
  const int64_t before = cache_.provisional();
  const int64_t first = cache_.length() + before;
  reserve_logits(logits_rows, out != nullptr);
  append(count);
  const int64_t known = early_.known(first, tokens, count);
  const int32_t begun = known ? early_.layers : 0;
  early_.layers = 0;  // what follows writes over these rows' keys and values, or uses them up
  try {
    if (begun) {
      const size_t hidden = static_cast<size_t>(model_->hidden);
      early_.x.resize(std::max(early_.x.size(), static_cast<size_t>(count) * hidden));
      run({tokens + known, early_.x.data() + static_cast<size_t>(known) * hidden, count - known, first + known, 0,
           begun});
    }
    run({begun ? nullptr : tokens, begun ? early_.x.data() : nullptr, count, first, begun, layers(), logits_rows, limit,
         out});
  } catch (...) {
    cache_.drop_to(before);
    throw;
  }
}

void Sequence::pass(const int32_t* tokens, float* x, int64_t count, int32_t logits_rows, int32_t limit) {
  const int64_t before = cache_.provisional();
  const int64_t first = cache_.length() + before;
  reserve_logits(logits_rows);
  append(count);
  try {
    run({tokens, x, count, first, 0, layers(), logits_rows, limit});
  } catch (...) {
    cache_.drop_to(before);
    throw;
  }
}

void Sequence::forward_range(const int32_t* tokens, float* x, int64_t count) {
  if (model_->last()) throw ShapeError("a range of layers with the model's last one ends in logits: verify it");
  if (tokens && !model_->first()) throw ShapeError("a range of layers after the first takes rows, not tokens");
  if (!tokens && model_->first()) throw ShapeError("a model's first layers take tokens, not rows");
  if (tokens) require_tokens(tokens, count);
  pass(tokens, x, count, 0, 0);
}

Verdict Sequence::verify_range(float* x, int64_t count, const Proposal& proposal, const Law& law, double lenience,
                               uint64_t seed, uint64_t round, Rule rule) {
  if (model_->first() || !model_->last())
    throw ShapeError("rows are verified by a model's last layers, without its first");
  const int64_t before = cache_.provisional(), position = cache_.length() + before + count;
  pass(nullptr, x, count + proposal.gamma(), proposal.gamma() + 1, law.limit(model_->vocab));
  return judge(proposal, before, position, law, lenience, seed, round, rule, nullptr);
}

void Sequence::restart(int64_t length, const std::vector<int64_t>& held) {
  early_.layers = 0;
  if (!cache_.restart(length, held)) throw_full(length);
}

void Sequence::assign(int64_t length, const std::vector<int64_t>& rows, const float* const* k, const float* const* v) {
  const KvShape& shape = cache_.shape();
  std::vector<int64_t> held(rows.size());
  for (size_t layer = 0; layer < rows.size(); layer++) {
    if (const int64_t left_out = length - rows[layer])
      held[layer] = left_out + cache_.window(static_cast<int>(layer)).sinks;
  }
  restart(length, held);
  for (int32_t layer = 0; layer < shape.layers; layer++) {
    const size_t l = static_cast<size_t>(layer);
    const int64_t sinks = cache_.window(layer).sinks;
    for (int32_t head = 0; head < shape.kv_heads; head++) {
      for (int64_t i = 0; i < rows[l]; i++) {
        const int64_t position = i < sinks ? i : length - rows[l] + i;
        if (position >= sinks && position < cache_.first_held(layer)) continue;  // another layer has less
        const size_t at = static_cast<size_t>(head * rows[l] + i) * static_cast<size_t>(shape.head_dim);
        model_->kernels->append_head(cache_.page(position / kPagePositions, layer, head), k[l] + at, v[l] + at,
                                     shape.head_dim, shape.padded_dim(), static_cast<int>(position % kPagePositions));
      }
    }
  }
}

void Sequence::require_finite(int32_t rows) const {
  for (int32_t m = 0; m < rows; m++) {
    if (!(best_[static_cast<size_t>(m)].poison == 0.0f))
      throw NumericalError("logits of row " + std::to_string(m) +
                           " are not finite (NaN or infinite); the weights are damaged or overflow at this precision");
  }
}

int32_t Sequence::adjust(Adjustments& adjustments, const Proposal& proposal, int32_t limit,
                         std::exception_ptr* failed) {
  adjustments.restart();
  for (int32_t m = 0; m <= proposal.gamma(); m++) {
    float* x = work_.logits.data() + static_cast<size_t>(m) * static_cast<size_t>(model_->vocab);
    RowMax& best = best_[static_cast<size_t>(m)];
    try {
      adjustments.edit(model_->kernels->law, x, limit, proposal.tokens.data(), m, &best);
    } catch (const MaskError& error) {
      *failed = error.cause;
      return m;
    }
    if (m == proposal.gamma() || status_of(best.value) != LawStatus::ok) return m;
    const int32_t drafted = proposal.tokens[static_cast<size_t>(m)];
    // Rows after a token that may not follow decide nothing, and a mask need not know what comes after it.
    const bool forbidden = drafted >= limit || x[drafted] == -std::numeric_limits<float>::infinity();
    if (forbidden || adjustments.ended_by(drafted)) return m + 1;
  }
  return proposal.gamma();
}

int32_t Sequence::draw(const Law& law, double u, float* q) {
  VerifyScratch& scratch = work_.verify;
  const auto prepare = [&](int threads) { scratch.reserve(threads, model_->vocab, law); };
  int32_t token = -1;
  const bool one_thread = !law.plain(model_->vocab) || alone();
  ThreadPool::instance().run(one_thread, prepare, [&](const Team& team) {
    const int32_t drawn = draw_row(model_->kernels->law, team, work_.logits.data(), model_->vocab, best_[0].value, law,
                                   u, q, scratch.laws[static_cast<size_t>(team.id)], scratch.shared);
    if (team.id == 0) token = drawn;
  });
  return token;
}

template <class Read>
void Sequence::draft_with(const Read& read, const int32_t* pending, int64_t count, int32_t gamma, const Law& law,
                          uint64_t seed, uint64_t round, Proposal& proposal, Rule rule, Adjustments* adjustments) {
  const size_t vocab = static_cast<size_t>(model_->vocab);
  const int32_t limit = law.limit(model_->vocab);
  const int64_t length = cache_.length();
  const bool coupled = rule == Rule::coupled;
  try {
    proposal.tokens.assign(static_cast<size_t>(gamma), -1);
    proposal.vocab = model_->vocab;
    proposal.q.resize(law.greedy() || coupled ? 0 : static_cast<size_t>(gamma) * vocab);
    read(pending, count, gamma > 0 ? 1 : 0);
    if (adjustments) adjustments->restart();
    for (int32_t i = 0; i < gamma; i++) {
      if (i > 0) read(&proposal.tokens[static_cast<size_t>(i - 1)], 1, 1);
      require_finite(1);
      if (adjustments) {
        bool known = true;
        try {
          adjustments->edit(model_->kernels->law, work_.logits.data(), limit, proposal.tokens.data(), i, best_.data());
        } catch (const MaskError&) {
          known = false;
        }
        if (!known || status_of(best_[0].value) != LawStatus::ok) {
          proposal.tokens.resize(static_cast<size_t>(i));
          break;
        }
      }
      int32_t token = best_[0].index;
      if (!law.greedy() && coupled) {
        const uint64_t position = static_cast<uint64_t>(length + count + i);
        token = couple_logits(model_->kernels->law, alone(), work_.logits.data(), model_->vocab, best_.data(), law,
                              nullptr, 0, seed, position, work_.verify)
                    .next_token;
      } else if (!law.greedy()) {
        const double u = uniform(seed, round, static_cast<uint32_t>(i), Purpose::draft);
        token = draw(law, u, proposal.q.data() + static_cast<size_t>(i) * vocab);
      }
      proposal.tokens[static_cast<size_t>(i)] = token;
      if (adjustments && adjustments->ended_by(token)) {
        proposal.tokens.resize(static_cast<size_t>(i) + 1);
        break;
      }
    }
  } catch (...) {
    cache_.drop_to(0);
    proposal.tokens.clear();
    throw;
  }
}

void Sequence::draft(const int32_t* pending, int64_t count, int32_t gamma, const Law& law, uint64_t seed,
                     uint64_t round, Proposal& proposal, Rule rule, Adjustments* adjustments) {
  const int32_t limit = law.limit(model_->vocab);
  const int64_t length = cache_.length();
  const int64_t needed = length + count + std::max(gamma - 1, 0);
  if (needed > cache_.capacity())
    throw ContextFullError("the draft's context holds " + std::to_string(cache_.capacity()) +
                           " tokens and this round needs " + std::to_string(needed));
  const auto read = [&](const int32_t* tokens, int64_t n, int32_t logits_rows) {
    forward(tokens, n, logits_rows, limit);
  };
  draft_with(read, pending, count, gamma, law, seed, round, proposal, rule, adjustments);
  cache_.commit_first(count);
}

void Sequence::draft_early(const int32_t* pending, int64_t count, int32_t gamma, int32_t exit, const Law& law,
                           uint64_t seed, uint64_t round, Proposal& proposal, Rule rule, Adjustments* adjustments) {
  require_whole();
  require_tokens(pending, count);
  const int32_t limit = law.limit(model_->vocab);
  const size_t hidden = static_cast<size_t>(model_->hidden);
  reserve_logits(1);
  early_.x.resize(std::max(early_.x.size(), static_cast<size_t>(count + gamma) * hidden));
  early_.layers = 0;
  early_.tokens.clear();
  early_.position = cache_.length();
  cache_.drop_to(0);
  append(count + gamma);  // all that will be verified, so that the pages are those of that pass
  const auto read = [&](const int32_t* tokens, int64_t n, int32_t logits_rows) {
    const size_t rows = early_.tokens.size();
    run({tokens, early_.x.data() + rows * hidden, n, early_.position + static_cast<int64_t>(rows), 0, exit, logits_rows,
         limit});
    early_.tokens.insert(early_.tokens.end(), tokens, tokens + n);
  };
  draft_with(read, pending, count, gamma, law, seed, round, proposal, rule, adjustments);
  cache_.drop_to(0);
  early_.layers = exit;
}

Verdict Sequence::verify(const int32_t* pending, int64_t count, const Proposal& proposal, const Law& law,
                         double lenience, uint64_t seed, uint64_t round, Rule rule, Adjustments* adjustments) {
  const int64_t before = cache_.provisional(), position = cache_.length() + before + count;
  std::vector<int32_t> tokens(pending, pending + count);
  tokens.insert(tokens.end(), proposal.tokens.begin(), proposal.tokens.end());
  forward(tokens.data(), static_cast<int64_t>(tokens.size()), proposal.gamma() + 1, law.limit(model_->vocab));
  return judge(proposal, before, position, law, lenience, seed, round, rule, adjustments);
}

Verdict Sequence::judge(const Proposal& proposal, int64_t before, int64_t position, const Law& law, double lenience,
                        uint64_t seed, uint64_t round, Rule rule, Adjustments* adjustments) {
  int32_t gamma = proposal.gamma();
  try {
    require_finite(gamma + 1);
    std::exception_ptr failed;
    if (adjustments) gamma = adjust(*adjustments, proposal, law.limit(model_->vocab), &failed);
    const Verdict verdict = decide(proposal, gamma, position, law, lenience, seed, round, rule);
    if (failed && verdict.tau == gamma) std::rethrow_exception(failed);
    return verdict;
  } catch (...) {
    cache_.drop_to(before);
    throw;
  }
}

Verdict Sequence::decide(const Proposal& proposal, int32_t gamma, int64_t position, const Law& law, double lenience,
                         uint64_t seed, uint64_t round, Rule rule) {
  if (law.greedy()) {
    std::vector<int32_t> best;
    for (const RowMax& row : best_) best.push_back(row.index);
    const Verdict verdict = verify_greedy(best.data(), proposal.tokens.data(), gamma);
    require_ok(status_of(best_[static_cast<size_t>(verdict.tau)].value), verdict.tau);
    return verdict;
  }
  const LawLoops& loops = model_->kernels->law;
  const float *logits = work_.logits.data(), *q = proposal.q.empty() ? nullptr : proposal.q.data();
  const int32_t *drafted = proposal.tokens.data(), V = model_->vocab;
  if (rule == Rule::coupled)
    return couple_logits(loops, alone(), logits, V, best_.data(), law, drafted, gamma, seed,
                         static_cast<uint64_t>(position), work_.verify);
  std::vector<double> u(static_cast<size_t>(gamma) + 1);
  for (int32_t i = 0; i < gamma; i++)
    u[static_cast<size_t>(i)] = uniform(seed, round, static_cast<uint32_t>(i), Purpose::accept);
  u.back() = uniform(seed, round, 0, Purpose::residual);  // one a round, the same draw whatever gamma is
  if (rule == Rule::block && q)
    return verify_logits_block(loops, alone(), logits, V, best_.data(), law, q, proposal.vocab, drafted, gamma,
                               u.data(), work_.verify);
  return verify_logits(loops, alone(), logits, V, best_.data(), law, q, proposal.vocab, drafted, gamma, u.data(),
                       lenience, work_.verify);
}

}  // namespace specfast
