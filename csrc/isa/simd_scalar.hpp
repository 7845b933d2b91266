// Vector primitives with one lane: the portable definition the other instruction sets are checked against.
#pragma once

#include <cstring>

#include "../types.hpp"

namespace {  // NOLINT: every instruction set has its own copy, none may be shared

constexpr int kLanes = 1;
constexpr int kRegisters = 16;

struct Vec {
  float v;
};

inline Vec zero() {
  return {0.0f};
}
inline Vec broadcast(float x) {
  return {x};
}
inline Vec load(const float* p) {
  return {*p};
}
inline Vec load_part(const float* p, int) {
  return {*p};
}
inline void store(float* p, Vec a) {
  *p = a.v;
}
inline void store_part(float* p, Vec a, int) {
  *p = a.v;
}
inline Vec add(Vec a, Vec b) {
  return {a.v + b.v};
}
inline Vec sub(Vec a, Vec b) {
  return {a.v - b.v};
}
inline Vec mul(Vec a, Vec b) {
  return {a.v * b.v};
}
inline Vec div(Vec a, Vec b) {
  return {a.v / b.v};
}
inline Vec max(Vec a, Vec b) {
  return {a.v > b.v ? a.v : b.v};
}
inline Vec min(Vec a, Vec b) {
  return {a.v < b.v ? a.v : b.v};
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return {a.v * b.v + c.v};
}
inline float sum(Vec a) {
  return a.v;
}
inline float maximum(Vec a) {
  return a.v;
}

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float from_bf16(uint16_t h) {
  return bits_to_float(static_cast<uint32_t>(h) << 16);
}
inline uint16_t to_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline float from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31u;
  const uint32_t mantissa = h & 1023u;
  if (exponent == 0) {
    const float tiny = static_cast<float>(mantissa) * bits_to_float(0x33800000u);  // mantissa * 2^-24
    return sign ? -tiny : tiny;
  }
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  return bits_to_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

inline Vec load_f16(const uint16_t* p) {
  return {from_f16(*p)};
}
inline Vec load_bf16(const uint16_t* p) {
  return {from_bf16(*p)};
}
inline void store_bf16_part(uint16_t* p, Vec a, int) {
  *p = to_bf16(a.v);
}

/// kLanes pairs of bf16, widened: no dot instruction here takes them as they are.
struct Pairs {
  Vec first, second;
};

inline Pairs load_pairs(const uint16_t* p) {
  return {{from_bf16(p[0])}, {from_bf16(p[1])}};
}

/// A pair of 16-bit integers, and a sum of products.
struct IntPairs {
  int32_t first, second;
};
using Ints = int32_t;

inline Ints no_ints() {
  return 0;
}
inline IntPairs load_int8_pairs(const int8_t* p) {
  return {p[0], p[1]};
}
inline IntPairs broadcast_int_pair(const int16_t* two) {
  return {two[0], two[1]};
}
inline Ints dot_int_pairs(Ints acc, IntPairs a, IntPairs b) {
  return acc + a.first * b.first + a.second * b.second;
}
inline Vec to_floats(Ints a) {
  return {static_cast<float>(a)};
}
/// Stores a float rounded to the nearest integer, ties to even; one that is no number as 0.
inline void store_int16(int16_t* p, Vec a) {
  const float whole = __builtin_rintf(a.v);
  *p = whole >= -32768.0f && whole <= 32767.0f ? static_cast<int16_t>(whole) : int16_t{0};
}

/// Values q of quantised weights at inputs k.., as floats.
inline Vec load_q4(const uint8_t* row, int k) {
  return {static_cast<float>((row[k / 2] >> (4 * (k % 2))) & 15)};
}
inline Vec load_q8(const uint8_t* row, int k) {
  return {static_cast<float>(row[k])};
}
inline Vec load_f16_part(const uint16_t* p, int) {
  return {from_f16(*p)};
}
inline Vec load_bf16_part(const uint16_t* p, int) {
  return {from_bf16(*p)};
}

/// 2^n for an integral n within the exponent range of normal floats.
inline Vec pow2(Vec n) {
  return {bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n.v) + 127) << 23)};
}
inline Vec round_even(Vec a) {
  return {__builtin_rintf(a.v)};
}

/// Keeps lanes below n, the others become `other`.
inline Vec keep(Vec a, int n, float other) {
  return {n > 0 ? a.v : other};
}

}  // namespace
