// Vector primitives of AVX2 with FMA and F16C: 8 float lanes.
#pragma once

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile with -mavx2 -mfma -mf16c"
#endif

#include <immintrin.h>

#include <cstring>

#include "../types.hpp"

namespace {  // NOLINT: every instruction set has its own copy, none may be shared

constexpr int kLanes = 8;
constexpr int kRegisters = 16;

using Vec = __m256;

/// All bits of the lanes below n.
inline __m256i low_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec zero() {
  return _mm256_setzero_ps();
}
inline Vec broadcast(float x) {
  return _mm256_set1_ps(x);
}
inline Vec load(const float* p) {
  return _mm256_loadu_ps(p);
}
inline Vec load_part(const float* p, int n) {
  return n >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, low_lanes(n));
}
inline void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a);
}
inline void store_part(float* p, Vec a, int n) {
  if (n >= 8) return _mm256_storeu_ps(p, a);
  _mm256_maskstore_ps(p, low_lanes(n), a);
}
inline Vec add(Vec a, Vec b) {
  return _mm256_add_ps(a, b);
}
inline Vec sub(Vec a, Vec b) {
  return _mm256_sub_ps(a, b);
}
inline Vec mul(Vec a, Vec b) {
  return _mm256_mul_ps(a, b);
}
inline Vec div(Vec a, Vec b) {
  return _mm256_div_ps(a, b);
}
inline Vec max(Vec a, Vec b) {
  return _mm256_max_ps(a, b);
}
inline Vec min(Vec a, Vec b) {
  return _mm256_min_ps(a, b);
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return _mm256_fmadd_ps(a, b, c);
}
// Written out, so that the order of the additions does not depend on the compiler.
inline float sum(Vec a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float maximum(Vec a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

inline float from_bf16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float from_f16(uint16_t h) {
  return _cvtsh_ss(h);
}

inline __m128i load_halves(const uint16_t* p, int n) {
  if (n >= 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  alignas(16) uint16_t lanes[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int i = 0; i < n; i++) lanes[i] = p[i];
  return _mm_load_si128(reinterpret_cast<const __m128i*>(lanes));
}
inline Vec load_f16_part(const uint16_t* p, int n) {
  return _mm256_cvtph_ps(load_halves(p, n));
}
inline Vec load_bf16_part(const uint16_t* p, int n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(p, n)), 16));
}
inline Vec load_f16(const uint16_t* p) {
  return load_f16_part(p, 8);
}
inline Vec load_bf16(const uint16_t* p) {
  return load_bf16_part(p, 8);
}
inline void store_bf16_part(uint16_t* p, Vec a, int n) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded, quiet, nan);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  if (n >= 8) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
  alignas(16) uint16_t lanes[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes), halves);
  for (int i = 0; i < n; i++) p[i] = lanes[i];
}

/// kLanes pairs of bf16, widened: no dot instruction here takes them as they are.
struct Pairs {
  Vec first, second;
};

inline Pairs load_pairs(const uint16_t* p) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))))};
}

/// 8 pairs of 16-bit integers, and 8 sums of their products.
using IntPairs = __m256i;
using Ints = __m256i;

inline Ints no_ints() {
  return _mm256_setzero_si256();
}
inline IntPairs load_int8_pairs(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline IntPairs broadcast_int_pair(const int16_t* two) {
  int32_t both;
  std::memcpy(&both, two, 4);
  return _mm256_set1_epi32(both);
}
inline Ints dot_int_pairs(Ints acc, IntPairs a, IntPairs b) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
}
inline Vec to_floats(Ints a) {
  return _mm256_cvtepi32_ps(a);
}
/// Stores kLanes floats rounded to the nearest integer, ties to even.
inline void store_int16(int16_t* p, Vec a) {
  const __m256i words = _mm256_cvtps_epi32(a);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
}

/// Values q of quantised weights at inputs k..k + 7, as floats.
inline Vec load_q4(const uint8_t* row, int k) {
  uint32_t packed;
  std::memcpy(&packed, row + k / 2, 4);
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  const __m256i q = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(packed)), shifts);
  return _mm256_cvtepi32_ps(_mm256_and_si256(q, _mm256_set1_epi32(15)));
}
inline Vec load_q8(const uint8_t* row, int k) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + k))));
}

/// 2^n for an integral n within the exponent range of normal floats.
inline Vec pow2(Vec n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Vec round_even(Vec a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/// Keeps lanes below n, the others become `other`.
inline Vec keep(Vec a, int n, float other) {
  return _mm256_blendv_ps(_mm256_set1_ps(other), a, _mm256_castsi256_ps(low_lanes(n)));
}

/// Four inputs of one row, in every lane.
inline __m256i broadcast_word(const int8_t* x) {
  int32_t word;
  std::memcpy(&word, x, 4);
  return _mm256_set1_epi32(word);
}

}  // namespace
