// The block rule from the target's logits: every row is weighed, and measured against the draft's law that follows it.
#include <algorithm>
#include <atomic>
#include <limits>

#include "thread_pool.hpp"
#include "verify_logits.hpp"

namespace specfast {
namespace {

/// The prefixes that have been followed, and the longest that has passed; every thread has its own and finds the same.
struct Scan {
  const float* q;
  int32_t Vq;
  const int32_t* tokens;
  int32_t gamma;
  const double* u;
  double prefix = 1.0, prefix_of_tau = 1.0;
  int32_t tau = 0;

  /// Goes on to the prefix that token m ends, whose target probability is px; false if no longer one can pass.
  bool follow(int32_t m, float px) noexcept {
    prefix = prefix_after(prefix, static_cast<double>(px), drafted_probability(q, Vq, tokens[m], m));
    return prefix > 0;
  }
  Drafted drafted(int32_t m) const noexcept { return drafted_after(q, Vq, gamma, m, prefix); }
  /// Whether what is left after m tokens is asked for.
  bool measured(int32_t m) const noexcept { return 0 < m && m < gamma; }
  /// Takes m tokens if that prefix passes, by the masses of what is left where it is measured.
  void take(int32_t m, const double* masses, const Blocks& blocks) noexcept {
    if (!(measured(m) ? prefix_passes(prefix, blocks.total(masses), u[m - 1]) : m == 0 || u[m - 1] < prefix)) return;
    tau = m;
    prefix_of_tau = prefix;
  }
};

/// The rows of one call: its arguments, and what its threads share.
struct BlockRows {
  const LawLoops& loops;
  const float* logits;
  int32_t V;
  const RowMax* best;
  const Law& law;
  const float* q;
  int32_t Vq;
  const int32_t* tokens;
  int32_t gamma;
  const double* u;
  VerifyScratch& scratch;
  const Blocks blocks{V};
  std::vector<LawStatus> status = std::vector<LawStatus>(static_cast<size_t>(gamma) + 1);
  std::vector<float> probability = std::vector<float>(static_cast<size_t>(gamma) + 1);
  std::atomic<int32_t> end{gamma};  // the last row that matters, or the first that has no law
  int32_t without_law = -1;         // a row that matters

  const float* row(int32_t m) const noexcept { return logits + static_cast<size_t>(m) * static_cast<size_t>(V); }
  RowLaw& law_of(int32_t m) const noexcept { return scratch.rows[static_cast<size_t>(m)]; }
  LawStatus& status_of(int32_t m) noexcept { return status[static_cast<size_t>(m)]; }
  double* masses_of(int32_t m) const noexcept { return scratch.masses.data() + static_cast<size_t>(m) * Blocks::kMost; }
  float highest_of(int32_t m) const noexcept { return best ? best[m].value : std::numeric_limits<float>::quiet_NaN(); }

  /// Threads share every row of a plain law, and go on while a longer prefix can pass; false if a row has no law.
  bool weigh_together(const Team& team, Scan& scan, int first, int last) {
    const int32_t parts = Blocks(law.limit(V)).count;
    for (int32_t m = 0;; m++) {
      SharedRow &own = scratch.shared[m % 2], &next = scratch.shared[(m + 1) % 2];
      const float* ahead = best || m == gamma ? nullptr : row(m + 1);
      const float highest = best || m == 0 ? highest_of(m) : loops.highest(own.highest, parts);
      float* store = scan.measured(m) ? scratch.weights.data() : nullptr;
      RowLaw found;
      const LawStatus state = plain_law(loops, team, row(m), V, highest, law, store, own, ahead, &next, &found);
      RowLaw lasting = found;  // its weights are computed again: the next row takes their place
      lasting.weights = lasting.store = nullptr;
      if (team.id == 0) {
        status_of(m) = state;
        law_of(m) = lasting;
        if (state != LawStatus::ok) without_law = m;
      }
      if (state != LawStatus::ok) return false;
      if (scan.measured(m)) {
        block_masses(loops, found, scan.drafted(m), blocks, first, last, masses_of(m));
        team.barrier();
      }
      scan.take(m, masses_of(m), blocks);
      if (m == gamma || !scan.follow(m, lasting.probability(loops, tokens[m]))) break;
    }
    team.barrier();
    return true;
  }

  /// Threads take the rows of a truncated law in turn, then the masses of those that matter; false if one has no law.
  bool weigh_in_turn(const Team& team, Scan& scan) {
    for (int32_t m = team.id; m <= end; m += team.size) {
      const size_t i = static_cast<size_t>(m);
      status[i] = brief_law(loops, row(m), V, highest_of(m), law, scratch.laws[i], nullptr, &scratch.rows[i]);
      if (status[i] == LawStatus::ok && m < gamma) probability[i] = law_of(m).probability(loops, tokens[m]);
      if (status[i] == LawStatus::ok && probability[i] > 0) continue;
      for (int32_t least = end; m < least && !end.compare_exchange_weak(least, m);) {
      }
      break;
    }
    team.barrier();
    const auto follow = [&](const auto& visit) {
      for (int32_t m = 0; m <= end; m++) {
        if (status_of(m) != LawStatus::ok) return m;
        visit(m);
        if (m == gamma || !scan.follow(m, probability[static_cast<size_t>(m)])) break;
      }
      return -1;
    };
    const int32_t bad = follow([&](int32_t m) {
      if (scan.measured(m) && m % team.size == team.id)
        block_masses(loops, law_of(m), scan.drafted(m), blocks, 0, blocks.count, masses_of(m));
    });
    if (team.id == 0) without_law = bad;
    if (bad >= 0) return false;
    team.barrier();
    scan.prefix = 1.0;
    follow([&](int32_t m) { scan.take(m, masses_of(m), blocks); });
    return true;
  }

  /// The token after the prefix that passed, on the first thread; the other threads help to measure.
  int32_t next_token(const Team& team, const Scan& scan, int first, int last) {
    const RowLaw& found = law_of(scan.tau);
    const Drafted drafted = drafted_after(q, Vq, gamma, scan.tau, scan.prefix_of_tau);
    if (!scan.measured(scan.tau)) {
      block_masses(loops, found, drafted, blocks, first, last, masses_of(scan.tau));
      team.barrier();
    }
    if (team.id != 0) return -1;
    const int32_t next = pick_token(loops, found, drafted, blocks, masses_of(scan.tau), u[gamma]);
    return next < 0 ? draw_token(loops, found, Drafted{}, V, u[gamma]) : next;
  }
};

}  // namespace

Verdict verify_logits_block(const LawLoops& loops, bool alone, const float* logits, int32_t V, const RowMax* best,
                            const Law& law, const float* q, int32_t Vq, const int32_t* tokens, int32_t gamma,
                            const double* u, VerifyScratch& scratch) {
  const size_t vocab = static_cast<size_t>(V), count = static_cast<size_t>(gamma) + 1;
  const bool plain = law.plain(V);
  scratch.rows.resize(std::max(scratch.rows.size(), count));
  if (plain) scratch.weights.resize(std::max(scratch.weights.size(), vocab));
  scratch.masses.resize(std::max(scratch.masses.size(), count * Blocks::kMost));
  BlockRows rows{loops, logits, V, best, law, q, Vq, tokens, gamma, u, scratch};
  Verdict verdict;
  const auto prepare = [&](int) { scratch.reserve(static_cast<int>(count), V, law); };
  ThreadPool::instance().run(alone, prepare, [&](const Team& team) {
    Scan scan{q, Vq, tokens, gamma, u};
    int first, last;
    team.part(rows.blocks.count, 1, &first, &last);
    if (!(plain ? rows.weigh_together(team, scan, first, last) : rows.weigh_in_turn(team, scan))) return;
    const int32_t next = rows.next_token(team, scan, first, last);
    if (team.id == 0) verdict = {scan.tau, next};
  });
  if (rows.without_law >= 0) require_ok(rows.status_of(rows.without_law), rows.without_law);
  return verdict;
}

}  // namespace specfast
