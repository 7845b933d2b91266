// A race of exponentials: the token whose noise over its weight is least. Only what may win is worked out exactly.
#include "couple_tokens.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>

#include "random.hpp"
#include "thread_pool.hpp"

namespace specfast {
namespace {

/// 2 atanh(s) for |s| <= 0.172, within 1 ulp or so.
double twice_atanh(double s) noexcept {
  const double square = s * s;
  double sum = 0;
  for (int k = 21; k >= 1; k -= 2) sum = sum * square + 1.0 / k;
  return 2.0 * s * sum;
}

/// -log(1 - u) for u in (0, 1), by arithmetic that is the same everywhere.
double exponential(double u) noexcept {
  if (u < 0.25) return twice_atanh(u / (2.0 - u));
  const uint64_t bits = std::bit_cast<uint64_t>(1.0 - u);
  int exponent = static_cast<int>(bits >> 52) - 1023;
  double fraction = std::bit_cast<double>((bits & 0xfffffffffffffu) | 0x3ff0000000000000u);
  if (fraction > 1.4142135623730951) {
    fraction *= 0.5;
    exponent++;
  }
  return -(exponent * 0.6931471805599453 + twice_atanh((fraction - 1.0) / (fraction + 1.0)));
}

double noise_from(uint32_t word, uint64_t seed, uint64_t position, int32_t token) noexcept {
  const double tail = static_cast<double>(noise_word(seed, position, token, Purpose::noise_tail));
  const double u = (static_cast<double>(word) + (tail + 0.5) * 0x1.0p-32) * 0x1.0p-32;
  return exponential(std::min(u, 1.0 - 0x1.0p-53));
}

/// The token that leads among those seen, in order.
struct Leader {
  uint64_t seed, position;
  int32_t token = -1;
  double ratio = std::numeric_limits<double>::infinity();
  float bound = std::numeric_limits<float>::infinity();  // a word / 2 above bound * weight cannot win

  void see(int32_t id, uint32_t word, float weight) noexcept {
    // The noise is at least u, and u at least word / 2^32.
    if (!(weight > 0) || static_cast<float>(static_cast<int32_t>(word >> 1)) > bound * weight) return;
    const double own = noise_from(word, seed, position, id) / static_cast<double>(weight);
    if (!(own < ratio)) return;
    ratio = own;
    token = id;
    const double most = own * 0x1.0p31 * (1.0 + 0x1.0p-20);
    bound = most < 1e38 ? static_cast<float>(most) : std::numeric_limits<float>::infinity();
  }
  void see(const Leader& later) noexcept {
    if (later.ratio < ratio) *this = later;
  }
};

/// Lets ids [first, last) of a row race, `first` a multiple of kChunk. The row's scale does not matter.
void race(const LawLoops& loops, const RowLaw& row, int32_t first, int32_t last, Leader* leader) noexcept {
  static_assert(kChunk % kNoiseGroup == 0);
  uint32_t words[kChunk];
  last = std::min(last, row.count);
  if (row.ids) {
    const int32_t *end = row.ids + row.count, *id = row.ids;
    while (id < end) {
      const int32_t group = *id / kNoiseGroup;
      loops.noise(leader->seed, leader->position, group, 1, words);
      for (; id < end && *id / kNoiseGroup == group; id++)
        leader->see(*id, words[*id % kNoiseGroup], row.weights[id - row.ids]);
    }
    return;
  }
  float buffer[kChunk];
  for (int32_t i = first; i < last; i += kChunk) {
    const int32_t n = std::min(kChunk, last - i);
    const float* weights = weights_of(loops, row, i, n, buffer);
    loops.noise(leader->seed, leader->position, i / kNoiseGroup, (n + kNoiseGroup - 1) / kNoiseGroup, words);
    if (!loops.any_within(words, weights, n, leader->bound)) continue;
    for (int32_t j = 0; j < n; j++) leader->see(i + j, words[j], weights[j]);
  }
}

}  // namespace

double noise_of(uint64_t seed, uint64_t position, int32_t token) noexcept {
  return noise_from(noise_word(seed, position, token, Purpose::noise), seed, position, token);
}

Verdict couple_tokens(const LawLoops& loops, const float* p, int32_t V, const int32_t* tokens, int32_t gamma,
                      uint64_t seed, uint64_t position) noexcept {
  for (int32_t m = 0;; m++) {
    Leader leader{seed, position + static_cast<uint64_t>(m)};
    race(loops, RowLaw{.count = V, .weights = p + static_cast<int64_t>(m) * V}, 0, V, &leader);
    if (m == gamma || leader.token != tokens[m]) return {m, leader.token};
  }
}

Verdict couple_logits(const LawLoops& loops, bool alone, const float* logits, int32_t V, const RowMax* best,
                      const Law& law, const int32_t* tokens, int32_t gamma, uint64_t seed, uint64_t position,
                      VerifyScratch& scratch) {
  const size_t count = static_cast<size_t>(gamma) + 1, vocab = static_cast<size_t>(V);
  const Blocks blocks(law.limit(V));
  std::vector<LawStatus> status(count);
  std::vector<int32_t> chosen(count, -1);
  std::vector<Leader> leaders;
  const auto prepare = [&](int threads) {
    scratch.reserve(threads, V, law);
    leaders.resize(2 * static_cast<size_t>(threads));
  };
  const auto highest_of = [&](int32_t m) { return best ? best[m].value : std::numeric_limits<float>::quiet_NaN(); };
  const auto leader_of = [&](int32_t m) { return Leader{seed, position + static_cast<uint64_t>(m)}; };

  std::atomic<int32_t> decisive{gamma};
  ThreadPool::instance().run(alone, prepare, [&](const Team& team) {
    if (law.plain(V)) {  // threads share every row
      int first, last;
      team.part(blocks.count, 1, &first, &last);
      for (int32_t m = 0;; m++) {
        const size_t i = static_cast<size_t>(m), turn = static_cast<size_t>(m % 2 * team.size);
        const float* x = logits + i * vocab;
        float highest = highest_of(m);
        if (std::isnan(highest)) {
          SharedRow& shared = scratch.shared[m % 2];
          for (int32_t b = first; b < last; b++)
            shared.highest[b] = loops.highest(x + blocks.first(b), blocks.last(b) - blocks.first(b));
          team.barrier();
          highest = loops.highest(shared.highest, blocks.count);
        }
        const LawStatus found = status_of(highest);
        Leader leader = leader_of(m);
        if (found == LawStatus::ok) {
          const RowLaw row{blocks.V, nullptr, nullptr, 1.0, x, highest, law.inverse_temperature(), nullptr};
          Leader& own = leaders[turn + static_cast<size_t>(team.id)];
          own = leader;
          if (first < last) race(loops, row, blocks.first(first), blocks.last(last - 1), &own);
          team.barrier();
          for (size_t t = 0; t < static_cast<size_t>(team.size); t++) leader.see(leaders[turn + t]);
        }
        if (found == LawStatus::ok && m < gamma && leader.token == tokens[m]) continue;
        if (team.id == 0) {
          status[i] = found;
          chosen[i] = leader.token;
          decisive = m;
        }
        return;
      }
    }
    for (int32_t m = team.id; m <= decisive; m += team.size) {  // threads take the rows in turn
      const size_t i = static_cast<size_t>(m);
      RowLaw row;
      status[i] = brief_law(loops, logits + i * vocab, V, highest_of(m), law,
                            scratch.laws[static_cast<size_t>(team.id)], nullptr, &row);
      if (status[i] == LawStatus::ok) {
        Leader leader = leader_of(m);
        race(loops, row, 0, V, &leader);
        chosen[i] = leader.token;
        if (m < gamma && leader.token == tokens[m]) continue;
      }
      for (int32_t first = decisive; m < first && !decisive.compare_exchange_weak(first, m);) {
      }
      return;
    }
  });
  require_ok(status[static_cast<size_t>(decisive)], decisive);
  return {decisive, chosen[static_cast<size_t>(decisive)]};
}

}  // namespace specfast
