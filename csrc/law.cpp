// A truncated softmax that counts keys instead of sorting the vocabulary.
#include "law.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "inverse_cdf.hpp"

namespace specfast {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// An integer in the order of the floats; -0 equals 0, NaNs lie beyond the infinities.
inline int32_t order_key(float x) noexcept {
  const int32_t bits = std::bit_cast<int32_t>(x + 0.0f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
/// The same, unsigned.
inline uint32_t unsigned_key(float x) noexcept {
  return static_cast<uint32_t>(order_key(x)) ^ 0x80000000u;
}

/// The float of an unsigned key.
inline float value_of(uint32_t key) noexcept {
  const int32_t bits = static_cast<int32_t>(key ^ 0x80000000u);
  return std::bit_cast<float>(bits ^ ((bits >> 31) & 0x7fffffff));
}

struct KeyRange {
  int32_t lowest, highest;

  bool has_nan() const noexcept { return lowest < order_key(-kInfinity) || highest > order_key(kInfinity); }
};

KeyRange key_range(const float* x, int32_t n) noexcept {
  int32_t lowest = std::numeric_limits<int32_t>::max(), highest = std::numeric_limits<int32_t>::min();
  for (int32_t i = 0; i < n; i++) {
    const int32_t key = order_key(x[i]);
    lowest = key < lowest ? key : lowest;
    highest = key > highest ? key : highest;
  }
  return {lowest, highest};
}

/// exp(x) for x <= 0 within 2 ulp; 0 below -87.3, before results become denormal.
///
/// Cody and Waite's reduction x = n ln 2 + r and a polynomial of degree 7 on |r| <= ln(2) / 2; exp(0) is exactly 1.
inline float exp_of_negative(float x) noexcept {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const int32_t limit = std::bit_cast<int32_t>(87.3f);
  // The clamp and the mask work on integers: comparisons of floats become branches, which GCC does not vectorise.
  const int32_t magnitude = std::min(std::bit_cast<int32_t>(x) & 0x7fffffff, limit);
  const float clamped = -std::bit_cast<float>(magnitude);
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float tail = 1.0f / 5040.0f;
  tail = tail * r + 1.0f / 720.0f;
  tail = tail * r + 1.0f / 120.0f;
  tail = tail * r + 1.0f / 24.0f;
  tail = tail * r + 1.0f / 6.0f;
  tail = tail * r + 0.5f;
  const float fraction = (tail * r) * r + r + 1.0f;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound);
  const int32_t bits = std::bit_cast<int32_t>(fraction) + exponent * (1 << 23);
  return std::bit_cast<float>(bits & -static_cast<int32_t>(magnitude < limit));
}

/// out[i] = exp((x[i] - highest) / temperature); `out` may be `x`.
void weigh(const float* x, int32_t n, float highest, float temperature, float* out) noexcept {
  if (out != x) {
    for (int32_t i = 0; i < n; i++) out[i] = exp_of_negative((x[i] - highest) / temperature);
  } else {  // one pointer, so that the compiler sees that no element is read after it was written
    for (int32_t i = 0; i < n; i++) out[i] = exp_of_negative((out[i] - highest) / temperature);
  }
}

double total_of(const float* weights, int32_t n) noexcept {
  return sum_in_lanes(0, n, [weights](int32_t i) { return static_cast<double>(weights[i]); });
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

/// A logit that the k-th largest of n is very likely not below, with few above it: from a sample of them.
float likely_bound(const float* logits, int32_t n, int32_t k, uint32_t* sample) noexcept {
  constexpr int32_t kSample = 4096;
  const int32_t stride = n / kSample;
  const double share = static_cast<double>(k) * kSample / n;
  const int32_t rank = static_cast<int32_t>(share + 4.0 * std::sqrt(share)) + 4;  // four standard deviations
  if (stride < 4 || rank >= kSample) return -kInfinity;
  for (int32_t i = 0; i < kSample; i++) sample[i] = unsigned_key(logits[static_cast<int64_t>(i) * stride]);
  return value_of(cut_at_count(sample, kSample, rank, 32).key);
}

/// Fills scratch.ids with the ids of the k largest of n logits, ascending; 0 < k < n. `highest` is the largest.
void select_top_k(const float* logits, int32_t n, int32_t k, float highest, LawScratch& scratch) noexcept {
  uint32_t* keys = scratch.keys.data();
  int32_t* ids = scratch.ids.data();
  int32_t count = 0;
  float least = likely_bound(logits, n, k, keys);
  for (;; least = -kInfinity) {  // a second time only if the sample misled
    for (int32_t i = 0; i < n; i++) {
      ids[count] = i;
      count += logits[i] >= least;
    }
    if (count >= k) break;
    count = 0;
  }
  const uint32_t lowest_key = unsigned_key(least);
  for (int32_t c = 0; c < count; c++) keys[c] = unsigned_key(logits[ids[c]]) - lowest_key;

  const Cut cut = cut_at_count(keys, count, k, static_cast<int>(std::bit_width(unsigned_key(highest) - lowest_key)));
  int32_t kept = 0, equals = cut.equals;
  for (int32_t c = 0; c < count; c++) {
    const bool equal = keys[c] == cut.key;
    ids[kept] = ids[c];
    kept += keys[c] > cut.key || (equal && equals > 0);
    equals -= equal;
  }
}

/// Zeroes all but the fewest, largest weights that hold at least top_p of the mass.
void apply_top_p(float* weights, int32_t count, float top_p) noexcept {
  constexpr double kLeast = std::numeric_limits<double>::min();  // so that something is kept
  const double wanted = std::max(static_cast<double>(top_p) * total_of(weights, count), kLeast);
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

}  // namespace

LawStatus law_row(const float* logits, int32_t vocab, const Law& law, float* p, LawScratch& scratch) noexcept {
  const int32_t n = law.limit(vocab);
  const bool truncate = law.top_k > 0 && law.top_k < n;
  const KeyRange range = key_range(logits, n);
  if (range.has_nan() || range.highest == order_key(kInfinity)) {
    std::fill(p, p + vocab, 0.0f);
    return LawStatus::not_finite;
  }
  if (n <= 0 || range.highest == order_key(-kInfinity)) {
    std::fill(p, p + vocab, 0.0f);
    return LawStatus::empty;
  }
  if (law.greedy() || (truncate && law.top_k == 1)) {
    std::fill(p, p + vocab, 0.0f);
    p[argmax_row(logits, n, 0)] = 1.0f;
    return LawStatus::ok;
  }
  const float highest = value_of(static_cast<uint32_t>(range.highest) ^ 0x80000000u);

  float* weights = p;  // of all tokens in place, or of those that top-k keeps
  int32_t count = n;
  if (truncate) {
    scratch.reserve(vocab);
    select_top_k(logits, n, law.top_k, highest, scratch);
    weights = scratch.values.data();
    count = law.top_k;
    for (int32_t c = 0; c < count; c++) weights[c] = logits[scratch.ids[static_cast<size_t>(c)]];
    weigh(weights, count, highest, law.temperature, weights);
  } else {
    weigh(logits, n, highest, law.temperature, weights);
  }
  if (law.top_p < 1.0f) apply_top_p(weights, count, law.top_p);
  if (law.min_p > 0.0f) apply_min_p(weights, count, law.min_p);

  const double scale = 1.0 / total_of(weights, count);
  if (truncate) {
    std::fill(p, p + vocab, 0.0f);
    for (int32_t c = 0; c < count; c++)
      p[scratch.ids[static_cast<size_t>(c)]] = static_cast<float>(static_cast<double>(weights[c]) * scale);
  } else {
    for (int32_t i = 0; i < n; i++) p[i] = static_cast<float>(static_cast<double>(weights[i]) * scale);
    std::fill(p + n, p + vocab, 0.0f);
  }
  return LawStatus::ok;
}

int32_t argmax_row(const float* logits, int32_t n, int32_t vocab_limit) noexcept {
  constexpr int32_t kBlock = 1024;
  const int32_t end = vocab_limit > 0 && vocab_limit < n ? vocab_limit : n;
  KeyRange best{0, std::numeric_limits<int32_t>::min()};
  int32_t first = -1;
  for (int32_t i = 0; i < end; i += kBlock) {
    const KeyRange range = key_range(logits + i, std::min(kBlock, end - i));
    if (range.has_nan()) return -1;
    if (first >= 0 && range.highest <= best.highest) continue;
    best = range;
    first = i;
  }
  if (first < 0) return -1;
  while (order_key(logits[first]) != best.highest) first++;
  return first;
}

int32_t sample_token(const float* p, int32_t vocab, double u) noexcept {
  return inverse_cdf(LawWeights{p}, vocab, u);
}

}  // namespace specfast
