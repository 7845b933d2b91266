// The loops of LawLoops, plain enough for a compiler to vectorise at any width, but for one it cannot.
#pragma once

#include "../law_loops.hpp"

#if defined(__clang__)
#define SPECFAST_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define SPECFAST_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace {

using namespace specfast;  // NOLINT: this header is only ever part of one instruction set's unit

inline int32_t bits_of(float x) {
  return __builtin_bit_cast(int32_t, x);
}
inline float float_of(int32_t bits) {
  return __builtin_bit_cast(float, bits);
}
/// An integer in the order of the floats, and its own inverse; NaNs lie beyond the infinities.
inline int32_t in_order(int32_t bits) {
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

float highest(const float* x, int n) {
  // Comparisons of floats become branches, which GCC does not vectorise; so these loops compare integers.
  constexpr int32_t kInfinity = 0x7f800000, kMinusInfinity = -kInfinity - 1;
  int32_t low = kMinusInfinity, high = kMinusInfinity;
  for (int i = 0; i < n; i++) {
    const int32_t key = in_order(bits_of(x[i]));
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  return low < kMinusInfinity ? float_of(0x7fc00000) : float_of(in_order(high));
}

/// Cody and Waite's reduction x = n ln 2 + r and a polynomial of degree 7 on |r| <= ln(2) / 2; exp(0) is exactly 1.
inline float exp_of_negative(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  constexpr float kLimit = 87.3f;        // results stay normal numbers
  const int32_t limit = bits_of(kLimit), unlimited = bits_of(x) & 0x7fffffff;
  const int32_t magnitude = unlimited < limit ? unlimited : limit;
  const float clamped = -float_of(magnitude);
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
  const int32_t exponent = bits_of(shifted) - bits_of(kRound);
  return float_of((bits_of(fraction) + exponent * (1 << 23)) & ((magnitude - limit) >> 31));  // 0 from the limit on
}

void weigh(const float* x, int n, float highest, float temperature, float* w) {
  SPECFAST_INDEPENDENT
  for (int i = 0; i < n; i++) w[i] = exp_of_negative((x[i] - highest) / temperature);
}

void normalise(const float* w, int n, double scale, float* p) {
  SPECFAST_INDEPENDENT
  for (int i = 0; i < n; i++) p[i] = static_cast<float>(static_cast<double>(w[i]) * scale);
}

/// sum(f(i)) for i in [0, n).
template <class F>
inline double sum_in_lanes(int n, const F& f) {
  double sum[kSumLanes] = {};
  int i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    for (int j = 0; j < kSumLanes; j++) sum[j] += f(i + j);
  }
  for (int j = 0; i + j < n; j++) sum[j] += f(i + j);
  for (int j = 0; j < 8; j++) sum[j] += sum[j + 8];
  for (int j = 0; j < 4; j++) sum[j] += sum[j + 4];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

double mass(const float* p, int n) {
  return sum_in_lanes(n, [p](int i) { return static_cast<double>(p[i]); });
}

double residual_mass(const float* p, const float* q, double kept, int n) {
  return sum_in_lanes(n, [p, q, kept](int i) {
    const double mass = static_cast<double>(p[i]), most = kept * mass, drafted = static_cast<double>(q[i]);
    return mass - (most < drafted ? most : drafted);
  });
}

#if defined(__AVX512F__)
int at_least(const float* x, int n, float least, int32_t* ids) {
  const __m512 bound = _mm512_set1_ps(least);
  const __m512i sixteen = _mm512_set1_epi32(16);
  __m512i id = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int count = 0;
  for (int i = 0; i < n; i += 16, id = _mm512_add_epi32(id, sixteen)) {
    const __mmask16 inside = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1);
    const __mmask16 kept = _mm512_mask_cmp_ps_mask(inside, _mm512_maskz_loadu_ps(inside, x + i), bound, _CMP_GE_OQ);
    _mm512_storeu_si512(ids + count, _mm512_maskz_compress_epi32(kept, id));
    count += __builtin_popcount(kept);
  }
  return count;
}
#else
int at_least(const float* x, int n, float least, int32_t* ids) {
  constexpr int kBlock = 64;
  int count = 0;
  for (int first = 0; first < n; first += kBlock) {
    const int last = n - first < kBlock ? n : first + kBlock;
    int any = 0;
    for (int i = first; i < last; i++) any |= x[i] >= least;
    if (!any) continue;
    for (int i = first; i < last; i++) {
      ids[count] = i;
      count += x[i] >= least;
    }
  }
  return count;
}
#endif

constexpr LawLoops kLawLoops{highest, weigh, normalise, mass, residual_mass, at_least};

}  // namespace
