// How often a token drafted after some of a model's layers would be accepted, measured on given tokens.
#include <algorithm>

#include "decoder.hpp"
#include "thread_pool.hpp"

namespace specfast {
namespace {

/// sum(min(p, q)) over (V,).
double overlap(const float* p, const float* q, int32_t V) {
  constexpr int32_t kLanes = 8;
  double sums[kLanes] = {};
  int32_t v = 0;
  for (; v + kLanes <= V; v += kLanes) {
    for (int32_t lane = 0; lane < kLanes; lane++) sums[lane] += static_cast<double>(std::min(p[v + lane], q[v + lane]));
  }
  for (; v < V; v++) sums[0] += static_cast<double>(std::min(p[v], q[v]));
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

}  // namespace

std::vector<double> Sequence::exit_acceptance(const int32_t* tokens, int64_t count, const std::vector<int32_t>& exits,
                                              const Law& law) {
  require_whole();
  require_tokens(tokens, count);
  const int32_t V = model_->vocab, limit = law.limit(V);
  const size_t vocab = static_cast<size_t>(V), hidden = static_cast<size_t>(model_->hidden);
  const int64_t before = cache_.provisional(), first = cache_.length() + before;
  std::vector<double> acceptance(exits.size());
  append(count);
  early_.layers = 0;
  try {
    reserve_logits(kTileRows);
    std::vector<float> p(kTileRows * vocab), x(exits.size() * kTileRows * hidden);
    std::vector<LawScratch> scratch;
    std::vector<std::vector<float>> q;
    double overlaps[kTileRows];
    const auto prepare = [&](int threads) {
      scratch.resize(static_cast<size_t>(threads));
      q.resize(static_cast<size_t>(threads));
      for (LawScratch& one : scratch) one.reserve(V);
      for (std::vector<float>& one : q) one.resize(vocab);
    };
    /// Writes the laws of the last M logits to p, or their overlaps with it.
    const auto laws = [&](int32_t M, bool target) {
      require_finite(M);
      LawStatus status[kTileRows] = {};
      ThreadPool::instance().run(alone(), prepare, [&](const Team& team) {
        const size_t thread = static_cast<size_t>(team.id);
        for (int32_t m = team.id; m < M; m += team.size) {
          const size_t row = static_cast<size_t>(m);
          float* out = target ? p.data() + row * vocab : q[thread].data();
          status[m] = law_row(model_->kernels->law, work_.logits.data() + row * vocab, V, best_[row].value, law, out,
                              scratch[thread]);
          if (!target) overlaps[m] = overlap(p.data() + row * vocab, out, V);
        }
      });
      for (int32_t m = 0; m < M; m++) require_ok(status[m], m);
    };
    for (int64_t done = 0; done < count; done += kTileRows) {
      const int32_t M = static_cast<int32_t>(std::min<int64_t>(kTileRows, count - done));
      const int64_t position = first + done;
      int32_t layer = 0;
      for (size_t i = 0; i < exits.size(); i++) {
        float* here = x.data() + i * kTileRows * hidden;
        if (i > 0) std::copy_n(here - kTileRows * hidden, kTileRows * hidden, here);
        run({i > 0 ? nullptr : tokens + done, here, M, position, layer, exits[i], 0, limit});
        layer = exits[i];
      }
      run({nullptr, x.data() + (exits.size() - 1) * kTileRows * hidden, M, position, layer, layers(), M, limit});
      laws(M, true);
      for (size_t i = 0; i < exits.size(); i++) {
        run({nullptr, x.data() + i * kTileRows * hidden, M, position, exits[i], exits[i], M, limit});
        laws(M, false);
        for (int32_t m = 0; m < M; m++) acceptance[i] += overlaps[m];
      }
    }
  } catch (...) {
    cache_.drop_to(before);
    throw;
  }
  for (double& one : acceptance) one /= static_cast<double>(count);
  return acceptance;
}

}  // namespace specfast
