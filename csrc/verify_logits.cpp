// Rows in turn until one decides, then one draw that all threads share.
#include "verify_logits.hpp"

#include <atomic>
#include <limits>

#include "thread_pool.hpp"

namespace specfast {

Verdict verify_logits(const LawLoops& loops, bool alone, const float* logits, int32_t V, const RowMax* best,
                      const Law& law, const float* q, int32_t Vq, const int32_t* tokens, int32_t gamma, const double* u,
                      double lenience, VerifyScratch& scratch) {
  const size_t count = static_cast<size_t>(gamma) + 1, vocab = static_cast<size_t>(V);
  scratch.rows.resize(std::max(scratch.rows.size(), count));
  std::vector<LawStatus> status(count);
  const auto prepare = [&](int threads) { scratch.reserve(threads, V, law); };
  const auto highest_of = [&](int32_t m) { return best ? best[m].value : std::numeric_limits<float>::quiet_NaN(); };
  /// Whether the rule goes on to the row after m.
  const auto goes_on = [&](int32_t m, LawStatus found, const RowLaw& row) {
    return found == LawStatus::ok && m < gamma && keeps(loops, row, q, Vq, tokens[m], m, u[m], lenience);
  };

  const Blocks blocks(V);
  double mass[Blocks::kMost];
  std::atomic<int32_t> decisive{gamma};
  Verdict verdict;
  ThreadPool::instance().run(alone, prepare, [&](const Team& team) {
    if (law.plain(V)) {
      const int32_t parts = Blocks(law.limit(V)).count;
      for (int32_t m = 0;; m++) {
        SharedRow &own = scratch.shared[m % 2], &next = scratch.shared[(m + 1) % 2];
        const float* x = logits + static_cast<size_t>(m) * vocab;
        const float* ahead = best || m == gamma ? nullptr : x + V;
        const float highest = best || m == 0 ? highest_of(m) : loops.highest(own.highest, parts);
        RowLaw row;
        const LawStatus found = plain_law(loops, team, x, V, highest, law, nullptr, own, ahead, &next, &row);
        if (goes_on(m, found, row)) continue;
        if (team.id == 0) {
          scratch.rows[static_cast<size_t>(m)] = row;
          status[static_cast<size_t>(m)] = found;
          decisive = m;
        }
        break;
      }
    } else {
      // A thread that has found a decisive row leaves its buffers, which that row's law views, as they are.
      for (int32_t m = team.id; m <= decisive; m += team.size) {
        const size_t i = static_cast<size_t>(m);
        status[i] = brief_law(loops, logits + i * vocab, V, highest_of(m), law,
                              scratch.laws[static_cast<size_t>(team.id)], nullptr, &scratch.rows[i]);
        if (goes_on(m, status[i], scratch.rows[i])) continue;
        for (int32_t first = decisive; m < first && !decisive.compare_exchange_weak(first, m);) {
        }
        break;
      }
    }
    team.barrier();
    const int32_t tau = decisive;
    if (status[static_cast<size_t>(tau)] != LawStatus::ok) return;
    const RowLaw& row = scratch.rows[static_cast<size_t>(tau)];
    const Drafted drafted = drafted_in(q, Vq, tokens, gamma, tau, lenience);
    int first, last;
    team.part(blocks.count, 1, &first, &last);
    block_masses(loops, row, drafted, blocks, first, last, mass);
    team.barrier();
    if (team.id != 0) return;
    int32_t next = pick_token(loops, row, drafted, blocks, mass, u[gamma]);
    if (next < 0) next = draw_token(loops, row, Drafted{}, V, u[gamma]);
    verdict = {tau, next};
  });
  require_ok(status[static_cast<size_t>(decisive)], decisive);
  return verdict;
}

}  // namespace specfast
