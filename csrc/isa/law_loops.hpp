// The loops of LawLoops, plain enough for a compiler to vectorise at any width, but for two.
#pragma once

#include "../law_loops.hpp"
#include "../random.hpp"

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

// exp(x) for x <= 0: Cody and Waite's reduction x = n ln 2 + r and a polynomial of degree 7 on |r| <= ln(2) / 2.
constexpr float kLimit = 87.3f;        // from here on 0, so that results stay normal numbers
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
constexpr float kTail[6] = {1.0f / 5040.0f, 1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f};

/// exp(0) is exactly 1.
[[maybe_unused]] inline float exp_of_negative(float x) {
  const int32_t limit = bits_of(kLimit), unlimited = bits_of(x) & 0x7fffffff;
  const int32_t magnitude = unlimited < limit ? unlimited : limit;
  const float clamped = -float_of(magnitude);
  const float shifted = clamped * kLog2e + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * kLn2High) - n * kLn2Low;
  float tail = kTail[0];
  for (int c = 1; c < 6; c++) tail = tail * r + kTail[c];
  const float fraction = (tail * r) * r + r + 1.0f;
  const int32_t exponent = bits_of(shifted) - bits_of(kRound);
  return float_of((bits_of(fraction) + exponent * (1 << 23)) & ((magnitude - limit) >> 31));  // 0 from the limit on
}

#if defined(__AVX512F__)
/// exp_of_negative's arithmetic in its order on N vectors side by side, more than the scheduler would find by itself.
/// The clamp becomes a mask, and one instruction sets the exponent. `inside` are the lanes of all of them that exist.
template <int N>
inline void weigh_vectors(const float* x, float highest, float inverse_temperature, __mmask16 inside, float* w) {
  const auto all = [](float value) { return _mm512_set1_ps(value); };
  __m512 d[N], e[N], r[N], tail[N];
  SPECFAST_UNROLL
  for (int v = 0; v < N; v++) {
    d[v] =
        _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(inside, x + 16 * v), all(highest)), all(inverse_temperature));
    e[v] = _mm512_sub_ps(_mm512_add_ps(_mm512_mul_ps(d[v], all(kLog2e)), all(kRound)), all(kRound));
  }
  SPECFAST_UNROLL
  for (int v = 0; v < N; v++) {
    r[v] = _mm512_sub_ps(_mm512_sub_ps(d[v], _mm512_mul_ps(e[v], all(kLn2High))), _mm512_mul_ps(e[v], all(kLn2Low)));
    tail[v] = all(kTail[0]);
  }
  SPECFAST_UNROLL
  for (int c = 1; c < 6; c++) {
    SPECFAST_UNROLL
    for (int v = 0; v < N; v++) tail[v] = _mm512_add_ps(_mm512_mul_ps(tail[v], r[v]), all(kTail[c]));
  }
  SPECFAST_UNROLL
  for (int v = 0; v < N; v++) {
    const __m512 square = _mm512_mul_ps(_mm512_mul_ps(tail[v], r[v]), r[v]);
    const __m512 fraction = _mm512_add_ps(_mm512_add_ps(square, r[v]), all(1.0f));
    const __mmask16 within = _mm512_cmp_ps_mask(d[v], all(-kLimit), _CMP_GT_OQ);
    _mm512_mask_storeu_ps(w + 16 * v, inside, _mm512_maskz_scalef_ps(within, fraction, e[v]));
  }
}

void weigh(const float* x, int n, float highest, float inverse_temperature, float* w) {
  int i = 0;
  for (; i + 64 <= n; i += 64) weigh_vectors<4>(x + i, highest, inverse_temperature, 0xffff, w + i);
  for (; i < n; i += 16) {
    const __mmask16 inside = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1);
    weigh_vectors<1>(x + i, highest, inverse_temperature, inside, w + i);
  }
}
#else
void weigh(const float* x, int n, float highest, float inverse_temperature, float* w) {
  SPECFAST_INDEPENDENT
  for (int i = 0; i < n; i++) w[i] = exp_of_negative((x[i] - highest) * inverse_temperature);
}
#endif

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

double residual_mass(const float* w, double scale, const float* q, double prefix, double kept, int n) {
  const auto mass_of = [w, scale, prefix](int i) {
    return prefix * static_cast<double>(static_cast<float>(static_cast<double>(w[i]) * scale));
  };
  if (kept == 1.0) {
    return sum_in_lanes(n, [q, mass_of](int i) {
      const double mass = mass_of(i), drafted = static_cast<double>(q[i]);
      return mass - (mass < drafted ? mass : drafted);
    });
  }
  return sum_in_lanes(n, [q, mass_of, kept](int i) {
    const double mass = mass_of(i), most = kept * mass, drafted = static_cast<double>(q[i]);
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

#if defined(__AVX512F__)
void noise(uint64_t seed, uint64_t position, int group, int groups, uint32_t* words) {
  // Every 64-bit lane holds one word; its upper half is never read. Even counters are in one vector, odd in the other.
  const auto all = [](uint64_t value) { return _mm512_set1_epi64(static_cast<int64_t>(value)); };
  const __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
  for (int g = 0; g < groups; g++) {
    const uint32_t first = static_cast<uint32_t>(group + g) * kNoiseCounters;
    __m512i c[2][4];
    for (int v = 0; v < 2; v++) {
      c[v][0] = _mm512_add_epi64(even, all(first + static_cast<uint32_t>(v)));
      c[v][1] = all(position);
      c[v][2] = all(position >> 32);
      c[v][3] = all(static_cast<uint32_t>(Purpose::noise));
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    SPECFAST_UNROLL
    for (int round = 0; round < 10; round++) {
      SPECFAST_UNROLL
      for (int v = 0; v < 2; v++) {
        const __m512i a = _mm512_mul_epu32(c[v][0], all(0xD2511F53u)), b = _mm512_mul_epu32(c[v][2], all(0xCD9E8D57u));
        c[v][0] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(b, 32), c[v][1], all(k0), 0x96);  // xor of the three
        c[v][2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), c[v][3], all(k1), 0x96);
        c[v][1] = b;
        c[v][3] = a;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int w = 0; w < 4; w++) {
      const __m512i odd = _mm512_slli_epi64(c[1][w], 32);
      _mm512_storeu_si512(words + g * kNoiseGroup + w * kNoiseCounters, _mm512_mask_mov_epi32(c[0][w], 0xaaaa, odd));
    }
  }
}
#else
void noise(uint64_t seed, uint64_t position, int group, int groups, uint32_t* words) {
  for (int g = 0; g < groups; g++) {
    uint32_t* out = words + g * kNoiseGroup;
    SPECFAST_INDEPENDENT
    for (int i = 0; i < kNoiseCounters; i++) {
      const uint32_t counter[4] = {static_cast<uint32_t>((group + g) * kNoiseCounters + i),
                                   static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32),
                                   static_cast<uint32_t>(Purpose::noise)};
      const Philox drawn = philox(counter, seed);
      for (int w = 0; w < 4; w++) out[w * kNoiseCounters + i] = drawn.word[w];
    }
  }
}
#endif

bool any_within(const uint32_t* words, const float* w, int n, float bound) {
  int any = 0;
  for (int i = 0; i < n; i++) any |= static_cast<float>(static_cast<int32_t>(words[i] >> 1)) <= bound * w[i];
  return any != 0;
}

constexpr LawLoops kLawLoops{highest, weigh, normalise, mass, residual_mass, at_least, noise, any_within};

}  // namespace
