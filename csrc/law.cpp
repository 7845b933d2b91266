// Truncated softmax by counting keys, without sorting the vocabulary.
#include "law.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "inverse_cdf.hpp"

namespace specfast {
namespace {

constexpr int kBins = 2048;

/// Order-preserving integer of a float; its top 11 bits choose one of 2048 bins.
inline uint32_t order_key(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
inline uint32_t bin_of(float x) { return order_key(x) >> 21; }

/// What a truncation keeps: everything above `threshold`, and ids below `tie_end` equal to it.
struct Cut {
  float threshold;
  int32_t tie_end;
};

/// Keeps the k largest of n values.
Cut cut_to_count(const float* x, int32_t n, int32_t k, LawScratch& scratch) {
  int32_t count[kBins] = {};
  for (int32_t i = 0; i < n; i++) count[bin_of(x[i])]++;
  int32_t above = 0;
  uint32_t bin = kBins - 1;
  while (above + count[bin] < k) above += count[bin--];
  scratch.values.clear();
  for (int32_t i = 0; i < n; i++) {
    if (bin_of(x[i]) == bin) scratch.values.push_back(x[i]);
  }
  const auto wanted = scratch.values.begin() + (k - above - 1);
  std::nth_element(scratch.values.begin(), wanted, scratch.values.end(), std::greater<float>());
  const float threshold = *wanted;
  int32_t ties = k;
  for (int32_t i = 0; i < n; i++) ties -= x[i] > threshold;
  int32_t end = 0;
  for (; end < n && ties > 0; end++) ties -= x[end] == threshold;
  return {threshold, end};
}

/// Keeps the largest of n masses until they hold at least `wanted`.
Cut cut_to_mass(const float* p, int32_t n, double wanted, LawScratch& scratch) {
  double mass[kBins] = {};
  for (int32_t i = 0; i < n; i++) mass[bin_of(p[i])] += static_cast<double>(p[i]);
  double above = 0;
  uint32_t bin = kBins - 1;
  const uint32_t lowest = bin_of(0.0f);
  while (bin > lowest && above + mass[bin] < wanted) above += mass[bin--];
  scratch.ids.clear();
  for (int32_t i = 0; i < n; i++) {
    if (bin_of(p[i]) == bin && p[i] > 0) scratch.ids.push_back(i);
  }
  std::sort(scratch.ids.begin(), scratch.ids.end(), [p](int32_t a, int32_t b) { return p[a] > p[b] || (p[a] == p[b] && a < b); });
  for (const int32_t id : scratch.ids) {
    above += static_cast<double>(p[id]);
    if (above >= wanted) return {p[id], id + 1};
  }
  return {0.0f, n};
}

void apply(const Cut& cut, const float* x, float* p, int32_t n) {
  for (int32_t i = 0; i < n; i++) {
    if (!(x[i] > cut.threshold || (x[i] == cut.threshold && i < cut.tie_end))) p[i] = 0.0f;
  }
}

double total_of(const float* p, int32_t n) {
  double sum[4] = {0, 0, 0, 0};
  int32_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int32_t j = 0; j < 4; j++) sum[j] += static_cast<double>(p[i + j]);
  }
  for (; i < n; i++) sum[0] += static_cast<double>(p[i]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

}  // namespace

LawStatus law_row(const KernelTable& kernels, const float* logits, int32_t vocab, const Law& law, float* p,
                  LawScratch& scratch) {
  const int32_t n = law.limit(vocab);
  RowMax top;
  kernels.logits_rows(logits, n, 0, &top);
  if (!(top.poison == 0.0f)) {  // something is not finite: -inf is allowed, NaN and +inf are not
    float best = -INFINITY;
    for (int32_t i = 0; i < n; i++) {
      if (std::isnan(logits[i]) || logits[i] == INFINITY) return LawStatus::not_finite;
      best = std::max(best, logits[i]);
    }
    if (best == -INFINITY) return LawStatus::empty;
    top.value = best;
  }
  kernels.exp_row(logits, top.value, 1.0f / law.temperature, p, n);
  std::fill(p + n, p + vocab, 0.0f);
  if (law.top_k > 0 && law.top_k < n) apply(cut_to_count(logits, n, law.top_k, scratch), logits, p, n);
  double total = total_of(p, n);
  if (law.top_p < 1.0f) {
    scratch.values.assign(p, p + n);
    const Cut cut = cut_to_mass(p, n, static_cast<double>(law.top_p) * total, scratch);
    apply(cut, scratch.values.data(), p, n);
    total = total_of(p, n);
  }
  if (law.min_p > 0.0f) {
    for (int32_t i = 0; i < n; i++) p[i] = p[i] < law.min_p ? 0.0f : p[i];  // the largest is exp(0) = 1
    total = total_of(p, n);
  }
  const double inverse = 1.0 / total;
  for (int32_t i = 0; i < n; i++) p[i] = static_cast<float>(static_cast<double>(p[i]) * inverse);
  return LawStatus::ok;
}

int32_t sample_token(const float* p, int32_t vocab, double u) noexcept {
  return inverse_cdf(vocab, u, [p](int32_t i) { return static_cast<double>(p[i]); });
}

}  // namespace specfast
