// A truncated softmax that counts keys instead of sorting the vocabulary.
#include "law.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>

#include "errors.hpp"

namespace specfast {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// An unsigned integer in the order of the floats that are not NaN; -0 equals 0.
inline uint32_t key_of(float x) noexcept {
  const int32_t bits = std::bit_cast<int32_t>(x + 0.0f);
  return static_cast<uint32_t>(bits ^ ((bits >> 31) & 0x7fffffff)) ^ 0x80000000u;
}

/// The float of a key.
inline float value_of(uint32_t key) noexcept {
  const int32_t bits = static_cast<int32_t>(key ^ 0x80000000u);
  return std::bit_cast<float>(bits ^ ((bits >> 31) & 0x7fffffff));
}

double total_of(const LawLoops& loops, const float* weights, int32_t count) noexcept {
  const Blocks blocks(count);
  double mass[Blocks::kMost];
  block_masses(loops, RowLaw{.count = count, .weights = weights}, Drafted{}, blocks, 0, blocks.count, mass);
  return blocks.total(mass);
}

/// What a truncation keeps: elements above `key`, and of those equal to it the first `equals`.
struct Cut {
  uint32_t key;
  int32_t equals;
};

/// The cut that keeps the fewest, largest elements whose mass reaches `wanted`: radix selection, 11 bits at a time.
///
/// key_at(i), of `key_bits` bits, orders the elements; mass_at(i) >= 0 is equal for equal keys. Masses are added in
/// index order.
template <class Mass, class KeyAt, class MassAt>
Cut cut_at_mass(int32_t count, Mass wanted, int key_bits, const KeyAt& key_at, const MassAt& mass_at) noexcept {
  constexpr int kDigitBits = 11;
  Mass bins[1 << kDigitBits];
  Mass above{};
  uint32_t prefix = 0, prefix_mask = 0;
  for (int shift = key_bits; shift > 0;) {
    const int digit_bits = std::min(kDigitBits, shift);
    const uint32_t digit_mask = (1u << digit_bits) - 1;
    shift -= digit_bits;
    std::fill(bins, bins + digit_mask + 1, Mass{});
    for (int32_t i = 0; i < count; i++) {
      const uint32_t key = key_at(i);
      if ((key & prefix_mask) == prefix) bins[(key >> shift) & digit_mask] += mass_at(i);
    }
    uint32_t digit = digit_mask;
    while (digit > 0 && above + bins[digit] < wanted) above += bins[digit--];
    prefix |= digit << shift;
    prefix_mask |= digit_mask << shift;
  }
  int32_t equals = 0;
  for (int32_t i = 0; i < count && above < wanted; i++) {
    if (key_at(i) != prefix) continue;
    equals++;
    above += mass_at(i);
  }
  return {prefix, equals};
}

/// The cut that keeps the k largest of `count` keys.
Cut cut_at_count(const uint32_t* keys, int32_t count, int32_t k, int key_bits) noexcept {
  const auto key_at = [keys](int32_t i) { return keys[i]; };
  return cut_at_mass(count, k, key_bits, key_at, [](int32_t) { return int32_t{1}; });
}

/// Moves the ids that a cut keeps to the front; returns how many.
int32_t keep(const Cut& cut, const uint32_t* keys, int32_t count, int32_t* ids) noexcept {
  int32_t kept = 0, equals = cut.equals;
  for (int32_t c = 0; c < count; c++) {
    const bool equal = keys[c] == cut.key;
    ids[kept] = ids[c];
    kept += keys[c] > cut.key || (equal && equals > 0);
    equals -= equal;
  }
  return kept;
}

/// A logit that the k-th largest of n is very likely not below, with few above it: from a sample of them.
float likely_bound(const float* logits, int32_t n, int32_t k, uint32_t* sample) noexcept {
  constexpr int32_t kSample = 4096;
  const int32_t stride = n / kSample;
  const double share = static_cast<double>(k) * kSample / n;
  const int32_t rank = static_cast<int32_t>(share + 4.0 * std::sqrt(share)) + 4;  // four standard deviations
  if (stride < 4 || rank >= kSample) return -kInfinity;
  for (int32_t i = 0; i < kSample; i++) sample[i] = key_of(logits[static_cast<int64_t>(i) * stride]);
  return value_of(cut_at_count(sample, kSample, rank, 32).key);
}

/// Fills scratch.ids with the ids of the k largest of n logits, ascending; 0 < k < n. `highest` is the largest.
void select_top_k(const LawLoops& loops, const float* logits, int32_t n, int32_t k, float highest,
                  LawScratch& scratch) noexcept {
  uint32_t* keys = scratch.keys.data();
  int32_t* ids = scratch.ids.data();
  float least = likely_bound(logits, n, k, keys);
  int32_t count = loops.at_least(logits, n, least, ids);
  if (count < k) {  // the sample misled
    least = -kInfinity;
    count = loops.at_least(logits, n, least, ids);
  }
  const uint32_t lowest_key = key_of(least);
  for (int32_t c = 0; c < count; c++) keys[c] = key_of(logits[ids[c]]) - lowest_key;

  keep(cut_at_count(keys, count, k, static_cast<int>(std::bit_width(key_of(highest) - lowest_key))), keys, count, ids);
}

/// Zeroes all but the fewest, largest weights that hold at least top_p of the mass.
void apply_top_p(const LawLoops& loops, float* weights, int32_t count, float top_p) noexcept {
  constexpr double kLeast = std::numeric_limits<double>::min();  // so that something is kept
  const double wanted = std::max(static_cast<double>(top_p) * total_of(loops, weights, count), kLeast);
  const auto key_at = [weights](int32_t i) { return std::bit_cast<uint32_t>(weights[i]); };
  const auto mass_at = [weights](int32_t i) { return static_cast<double>(weights[i]); };
  const Cut cut = cut_at_mass(count, wanted, 30, key_at, mass_at);  // weights are at most 1
  int32_t equals = cut.equals;
  for (int32_t i = 0; i < count; i++) {
    const uint32_t key = key_at(i);
    const bool equal = key == cut.key;
    if (!(key > cut.key || (equal && equals > 0))) weights[i] = 0.0f;
    equals -= equal;
  }
}

void apply_min_p(float* weights, int32_t count, float min_p) noexcept {  // the largest weight is 1
  const float least = std::min(min_p, 1.0f);
  for (int32_t i = 0; i < count; i++) weights[i] = weights[i] < least ? 0.0f : weights[i];
}

/// Fills scratch.ids, ascending, with what top-p, min-p and top-k each keep at temperature 1; returns how many.
int32_t select_before_temperature(const LawLoops& loops, const float* logits, int32_t n, float highest, const Law& law,
                                  LawScratch& scratch) noexcept {
  float* weights = scratch.values.data();
  int32_t* ids = scratch.ids.data();
  loops.weigh(logits, n, highest, 1.0f, weights);
  if (law.top_p < 1.0f) apply_top_p(loops, weights, n, law.top_p);
  if (law.min_p > 0.0f) apply_min_p(weights, n, law.min_p);
  int32_t count = 0;
  for (int32_t i = 0; i < n; i++) {
    ids[count] = i;
    count += weights[i] > 0;
  }
  if (law.top_k <= 0 || law.top_k >= count) return count;
  uint32_t* keys = scratch.keys.data();
  for (int32_t c = 0; c < count; c++) keys[c] = key_of(logits[ids[c]]);
  const Cut cut = cut_at_count(keys, count, law.top_k, 32);
  return keep(cut, keys, count, ids);
}

}  // namespace

LawStatus plain_law(const LawLoops& loops, const Team& team, const float* logits, int32_t vocab, float highest,
                    const Law& law, float* p, SharedRow& shared, const float* ahead, SharedRow* next,
                    RowLaw* row) noexcept {
  const Blocks blocks(law.limit(vocab));
  const auto highest_of = [&](const float* x, int32_t b) {
    return loops.highest(x + blocks.first(b), blocks.last(b) - blocks.first(b));
  };
  int first, last;
  team.part(blocks.count, 1, &first, &last);
  if (std::isnan(highest)) {
    for (int32_t b = first; b < last; b++) shared.highest[b] = highest_of(logits, b);
    team.barrier();
    highest = loops.highest(shared.highest, blocks.count);
  }
  const LawStatus status = status_of(highest);
  if (status != LawStatus::ok) return status;
  *row = {blocks.V, nullptr, nullptr, 1.0, logits, highest, law.inverse_temperature(), p};
  constexpr int32_t kDistance = 8;  // blocks fetched before their maximum is wanted
  for (int32_t b = first; b < last; b++) {
    if (ahead) {
      for (int32_t i = 0; b + kDistance < last && i < blocks.size; i += 16)
        __builtin_prefetch(ahead + blocks.first(b + kDistance) + i);
      next->highest[b] = highest_of(ahead, b);
    }
    block_masses(loops, *row, Drafted{}, blocks, b, b + 1, shared.mass);
  }
  team.barrier();
  row->scale = 1.0 / blocks.total(shared.mass);
  row->weights = p;
  return status;
}

LawStatus brief_law(const LawLoops& loops, const float* logits, int32_t vocab, float highest, const Law& law,
                    LawScratch& scratch, float* p, RowLaw* row) noexcept {
  const int32_t n = law.limit(vocab);
  if (std::isnan(highest)) highest = loops.highest(logits, n);
  const LawStatus status = status_of(highest);
  if (status != LawStatus::ok) return status;

  const bool list = law.keeps_list(vocab);
  if (list || !p) scratch.reserve(vocab);
  float* weights = list || !p ? scratch.values.data() : p;
  *row = RowLaw{.count = n, .weights = weights};
  if (list) {
    int32_t* ids = scratch.ids.data();
    row->ids = ids;
    row->count = law.greedy() ? 1 : law.top_k;
    if (row->count == 1)
      *ids = argmax_row(loops, logits, n);
    else if (law.temper_last && (law.top_p < 1.0f || law.min_p > 0.0f))
      row->count = select_before_temperature(loops, logits, n, highest, law, scratch);
    else
      select_top_k(loops, logits, n, row->count, highest, scratch);
    for (int32_t c = 0; c < row->count; c++) weights[c] = logits[ids[c]];
  }
  loops.weigh(list ? weights : logits, row->count, highest, law.inverse_temperature(), weights);
  if (law.top_p < 1.0f && !law.temper_last) apply_top_p(loops, weights, row->count, law.top_p);
  if (law.min_p > 0.0f && !law.temper_last) apply_min_p(weights, row->count, law.min_p);
  row->scale = 1.0 / total_of(loops, weights, row->count);
  return status;
}

LawStatus law_row(const LawLoops& loops, const float* logits, int32_t vocab, float highest, const Law& law, float* p,
                  LawScratch& scratch) noexcept {
  RowLaw row;
  const LawStatus status = brief_law(loops, logits, vocab, highest, law, scratch, p, &row);
  if (status == LawStatus::ok && !row.ids) {
    loops.normalise(p, row.count, row.scale, p);
    std::fill(p + row.count, p + vocab, 0.0f);
    return status;
  }
  std::fill(p, p + vocab, 0.0f);
  if (status == LawStatus::ok) {
    loops.normalise(row.weights, row.count, row.scale, scratch.values.data());
    for (int32_t c = 0; c < row.count; c++) p[row.ids[c]] = row.weights[c];
  }
  return status;
}

int32_t draw_row(const LawLoops& loops, const Team& team, const float* logits, int32_t vocab, float highest,
                 const Law& law, double u, float* p, LawScratch& scratch, SharedRow* shared) noexcept {
  const Blocks blocks(vocab);
  int first, last;
  team.part(blocks.count, 1, &first, &last);
  if (law.plain(vocab)) {
    RowLaw row;
    if (plain_law(loops, team, logits, vocab, highest, law, p, shared[0], nullptr, nullptr, &row) != LawStatus::ok)
      return -1;
    for (int32_t b = first; b < last; b++) {
      const int32_t begin = blocks.first(b), middle = std::clamp(row.count, begin, blocks.last(b));
      loops.normalise(p + begin, middle - begin, row.scale, p + begin);
      std::fill(p + middle, p + blocks.last(b), 0.0f);
    }
  } else {
    if (team.id == 0) law_row(loops, logits, vocab, highest, law, p, scratch);
    team.barrier();
  }
  const RowLaw full{.count = vocab, .weights = p};
  block_masses(loops, full, Drafted{}, blocks, first, last, shared[1].mass);
  team.barrier();
  return team.id == 0 ? pick_token(loops, full, Drafted{}, blocks, shared[1].mass, u) : -1;
}

LawStatus status_of(float highest) noexcept {
  if (!(highest < kInfinity)) return LawStatus::not_finite;
  return highest == -kInfinity ? LawStatus::empty : LawStatus::ok;
}

void require_ok(LawStatus status, int32_t row) {
  const std::string number = std::to_string(row);
  if (status == LawStatus::not_finite) throw NumericalError("logits of row " + number + " hold NaN or +infinity");
  if (status == LawStatus::empty) throw NumericalError("row " + number + " allows no token: every logit is -infinity");
}

int32_t argmax_row(const LawLoops& loops, const float* logits, int32_t n) noexcept {
  const float* first = std::find(logits, logits + n, loops.highest(logits, n));
  return first < logits + n ? static_cast<int32_t>(first - logits) : -1;
}

int32_t sample_token(const LawLoops& loops, const float* p, int32_t vocab, double u) noexcept {
  return draw_token(loops, RowLaw{.count = vocab, .weights = p}, Drafted{}, vocab, u);
}

}  // namespace specfast
