// Rows in turn until one decides, then one draw that all threads share.
#include "verify_logits.hpp"

#include <atomic>
#include <limits>

#include "thread_pool.hpp"

namespace specfast {

Verdict verify_logits(const LawLoops& loops, bool alone, const float* logits, int32_t V, const RowMax* best,
                      const Law& law, const float* q, int32_t Vq, const int32_t* tokens, int32_t gamma, const double* u,
                      double lenience, VerifyScratch& scratch) {
  const size_t count = static_cast<size_t>(gamma) + 1;
  scratch.rows.resize(std::max(scratch.rows.size(), count));
  std::vector<LawStatus> status(count);
  const auto prepare = [&](int threads) {
    scratch.threads.resize(std::max(scratch.threads.size(), static_cast<size_t>(threads)));
    for (LawScratch& thread : scratch.threads) thread.reserve(V);
  };
  /// Whether row m lets the next one decide.
  const auto passes = [&](int32_t m, LawScratch& own) {
    const size_t i = static_cast<size_t>(m);
    const float highest = best ? best[i].value : std::numeric_limits<float>::quiet_NaN();
    RowLaw& row = scratch.rows[i];
    status[i] = brief_law(loops, logits + i * static_cast<size_t>(V), V, highest, law, own, nullptr, &row);
    return status[i] == LawStatus::ok && m < gamma && keeps(loops, row, q, Vq, tokens[i], m, u[i], lenience);
  };

  const Blocks blocks(V);
  double mass[Blocks::kMost];
  std::atomic<int32_t> decisive{gamma};
  Verdict verdict;
  ThreadPool::instance().run(alone, prepare, [&](const Team& team) {
    // A thread that has found a decisive row leaves its buffers, which that row's law may view, as they are.
    for (int32_t m = team.id; m <= decisive; m += team.size) {
      if (passes(m, scratch.threads[static_cast<size_t>(team.id)])) continue;
      for (int32_t first = decisive; m < first && !decisive.compare_exchange_weak(first, m);) {
      }
      break;
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
