// Vector primitives of AVX-512: 16 float lanes.
#pragma once

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VL__) || !defined(__AVX512DQ__) || \
    !defined(__AVX512VNNI__) || !defined(__AVX512BF16__)
#error "compile with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16 -mfma"
#endif

#include <immintrin.h>

#include <cstring>

#include "../types.hpp"

namespace {  // NOLINT: every instruction set has its own copy, none may be shared

constexpr int kLanes = 16;
constexpr int kRegisters = 32;

using Vec = __m512;

inline __mmask16 low_lanes(int n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u);
}

inline Vec zero() {
  return _mm512_setzero_ps();
}
inline Vec broadcast(float x) {
  return _mm512_set1_ps(x);
}
inline Vec load(const float* p) {
  return _mm512_loadu_ps(p);
}
inline Vec load_part(const float* p, int n) {
  return _mm512_maskz_loadu_ps(low_lanes(n), p);
}
inline void store(float* p, Vec a) {
  _mm512_storeu_ps(p, a);
}
inline void store_part(float* p, Vec a, int n) {
  _mm512_mask_storeu_ps(p, low_lanes(n), a);
}
inline Vec add(Vec a, Vec b) {
  return _mm512_add_ps(a, b);
}
inline Vec sub(Vec a, Vec b) {
  return _mm512_sub_ps(a, b);
}
inline Vec mul(Vec a, Vec b) {
  return _mm512_mul_ps(a, b);
}
inline Vec div(Vec a, Vec b) {
  return _mm512_div_ps(a, b);
}
inline Vec max(Vec a, Vec b) {
  return _mm512_max_ps(a, b);
}
inline Vec min(Vec a, Vec b) {
  return _mm512_min_ps(a, b);
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
}
// Written out, so that the order of the additions does not depend on the compiler.
inline float sum(Vec a) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
inline float maximum(Vec a) {
  return _mm512_reduce_max_ps(a);
}

inline float from_bf16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float from_f16(uint16_t h) {
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
}

inline Vec widen_bf16(__m256i h) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
inline Vec load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load_bf16(const uint16_t* p) {
  return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load_f16_part(const uint16_t* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(low_lanes(n), p));
}
inline Vec load_bf16_part(const uint16_t* p, int n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(low_lanes(n), p));
}
inline void store_bf16_part(uint16_t* p, Vec a, int n) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  _mm256_mask_storeu_epi16(p, low_lanes(n), _mm512_cvtepi32_epi16(rounded));
}

/// Values q of quantised weights at inputs k..k + 15, as floats.
inline Vec load_q4(const uint8_t* row, int k) {
  const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + k / 2));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(packed, mask), odd = _mm_and_si128(_mm_srli_epi16(packed, 4), mask);
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd)));
}
inline Vec load_q8(const uint8_t* row, int k) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + k))));
}

#define SPECFAST_BF16_DOT 1
/// 16 pairs of bf16, as the dot instruction takes them.
using Pairs = __m512bh;

inline Pairs load_pairs(const uint16_t* p) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}
/// Stores 16 floats as bf16 and returns what they became. Subnormal numbers become 0.
inline Vec store_bf16(uint16_t* p, Vec a) {
  const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded);
  return widen_bf16(rounded);
}
inline Pairs broadcast_pair(const uint16_t* two) {
  int32_t both;
  std::memcpy(&both, two, 4);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
}
/// The pairs with 0 for their second element.
inline Pairs first_of_pairs(Pairs a) {
  return reinterpret_cast<__m512bh>(_mm512_and_si512(reinterpret_cast<__m512i>(a), _mm512_set1_epi32(0xffff)));
}
/// Adds the products of 16 pairs of pairs to the lanes of acc.
inline Vec dot_pairs(Vec acc, Pairs a, Pairs b) {
  return _mm512_dpbf16_ps(acc, a, b);
}

/// 16 pairs of 16-bit integers, and 16 sums of their products.
using IntPairs = __m512i;
using Ints = __m512i;

inline Ints no_ints() {
  return _mm512_setzero_si512();
}
inline IntPairs load_int8_pairs(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline IntPairs broadcast_int_pair(const int16_t* two) {
  int32_t both;
  std::memcpy(&both, two, 4);
  return _mm512_set1_epi32(both);
}
inline Ints dot_int_pairs(Ints acc, IntPairs a, IntPairs b) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));  // GCC copies sums around the intrinsic
  return acc;
}
inline Vec to_floats(Ints a) {
  return _mm512_cvtepi32_ps(a);
}
/// Stores kLanes floats rounded to the nearest integer, ties to even.
inline void store_int16(int16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a)));
}

/// 2^n for an integral n within the exponent range of normal floats.
inline Vec pow2(Vec n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
inline Vec round_even(Vec a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/// Keeps lanes below n, the others become `other`.
inline Vec keep(Vec a, int n, float other) {
  return _mm512_mask_blend_ps(low_lanes(n < 0 ? 0 : n), _mm512_set1_ps(other), a);
}

}  // namespace
