// Vector primitives of NEON: 4 float lanes.
#pragma once

#if !defined(__ARM_FEATURE_DOTPROD)
#error "compile with -march=armv8.2-a+dotprod"
#endif

#include <arm_neon.h>

#include <cstring>

#include "../types.hpp"

namespace {  // NOLINT: every instruction set has its own copy, none may be shared

constexpr int kLanes = 4;
constexpr int kRegisters = 32;

using Vec = float32x4_t;

inline Vec zero() {
  return vdupq_n_f32(0.0f);
}
inline Vec broadcast(float x) {
  return vdupq_n_f32(x);
}
inline Vec load(const float* p) {
  return vld1q_f32(p);
}
inline Vec load_part(const float* p, int n) {
  if (n >= 4) return vld1q_f32(p);
  float lanes[4] = {0, 0, 0, 0};
  for (int i = 0; i < n; i++) lanes[i] = p[i];
  return vld1q_f32(lanes);
}
inline void store(float* p, Vec a) {
  vst1q_f32(p, a);
}
inline void store_part(float* p, Vec a, int n) {
  if (n >= 4) return vst1q_f32(p, a);
  float lanes[4];
  vst1q_f32(lanes, a);
  for (int i = 0; i < n; i++) p[i] = lanes[i];
}
inline Vec add(Vec a, Vec b) {
  return vaddq_f32(a, b);
}
inline Vec sub(Vec a, Vec b) {
  return vsubq_f32(a, b);
}
inline Vec mul(Vec a, Vec b) {
  return vmulq_f32(a, b);
}
inline Vec div(Vec a, Vec b) {
  return vdivq_f32(a, b);
}
// The second operand wins when a lane is NaN, as on the other instruction sets.
inline Vec max(Vec a, Vec b) {
  return vbslq_f32(vcgtq_f32(a, b), a, b);
}
inline Vec min(Vec a, Vec b) {
  return vbslq_f32(vcltq_f32(a, b), a, b);
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return vfmaq_f32(c, a, b);
}
inline float sum(Vec a) {
  return (vgetq_lane_f32(a, 0) + vgetq_lane_f32(a, 2)) + (vgetq_lane_f32(a, 1) + vgetq_lane_f32(a, 3));
}
inline float maximum(Vec a) {
  const float x = vgetq_lane_f32(a, 0), y = vgetq_lane_f32(a, 1), z = vgetq_lane_f32(a, 2), w = vgetq_lane_f32(a, 3);
  const float left = x > y ? x : y, right = z > w ? z : w;
  return left > right ? left : right;
}

inline float from_bf16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float from_f16(uint16_t h) {
  return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0);
}

inline uint16x4_t load_halves(const uint16_t* p, int n) {
  if (n >= 4) return vld1_u16(p);
  uint16_t lanes[4] = {0, 0, 0, 0};
  for (int i = 0; i < n; i++) lanes[i] = p[i];
  return vld1_u16(lanes);
}
inline Vec load_f16_part(const uint16_t* p, int n) {
  return vcvt_f32_f16(vreinterpret_f16_u16(load_halves(p, n)));
}
inline Vec load_bf16_part(const uint16_t* p, int n) {
  return vreinterpretq_f32_u32(vshll_n_u16(load_halves(p, n), 16));
}
inline Vec load_f16(const uint16_t* p) {
  return load_f16_part(p, 4);
}
inline Vec load_bf16(const uint16_t* p) {
  return load_bf16_part(p, 4);
}
inline void store_bf16_part(uint16_t* p, Vec a, int n) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
  const uint32x4_t quiet = vorrq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(0x40));
  const uint16x4_t halves = vmovn_u32(vbslq_u32(vceqq_f32(a, a), rounded, quiet));
  uint16_t lanes[4];
  vst1_u16(lanes, halves);
  for (int i = 0; i < (n < 4 ? n : 4); i++) p[i] = lanes[i];
}

/// kLanes pairs of bf16, widened: no dot instruction here takes them as they are.
struct Pairs {
  Vec first, second;
};

inline Pairs load_pairs(const uint16_t* p) {
  const uint32x4_t both = vreinterpretq_u32_u16(vld1q_u16(p));
  return {vreinterpretq_f32_u32(vshlq_n_u32(both, 16)),
          vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff0000u)))};
}

/// 4 pairs of 16-bit integers, and 4 sums of their products.
struct IntPairs {
  int16x4_t first, second;
};
using Ints = int32x4_t;

inline Ints no_ints() {
  return vdupq_n_s32(0);
}
inline IntPairs load_int8_pairs(const int8_t* p) {
  const int16x8_t both = vmovl_s8(vld1_s8(p));
  return {vuzp1_s16(vget_low_s16(both), vget_high_s16(both)), vuzp2_s16(vget_low_s16(both), vget_high_s16(both))};
}
inline IntPairs broadcast_int_pair(const int16_t* two) {
  return {vdup_n_s16(two[0]), vdup_n_s16(two[1])};
}
inline Ints dot_int_pairs(Ints acc, IntPairs a, IntPairs b) {
  return vmlal_s16(vmlal_s16(acc, a.first, b.first), a.second, b.second);
}
inline Vec to_floats(Ints a) {
  return vcvtq_f32_s32(a);
}
/// Stores kLanes floats rounded to the nearest integer, ties to even.
inline void store_int16(int16_t* p, Vec a) {
  vst1_s16(p, vqmovn_s32(vcvtnq_s32_f32(a)));
}

/// Values q of quantised weights at inputs k..k + 3, as floats.
inline Vec load_q4(const uint8_t* row, int k) {
  uint16_t packed;
  std::memcpy(&packed, row + k / 2, 2);
  const int32_t shifts[4] = {0, -4, -8, -12};
  return vcvtq_f32_u32(vandq_u32(vshlq_u32(vdupq_n_u32(packed), vld1q_s32(shifts)), vdupq_n_u32(15)));
}
inline Vec load_q8(const uint8_t* row, int k) {
  uint32_t packed;
  std::memcpy(&packed, row + k, 4);
  const uint16x8_t wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(packed)));
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide)));
}

/// 2^n for an integral n within the exponent range of normal floats.
inline Vec pow2(Vec n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
}
inline Vec round_even(Vec a) {
  return vrndnq_f32(a);
}

/// Keeps lanes below n, the others become `other`.
inline Vec keep(Vec a, int n, float other) {
  const int32_t lanes[4] = {0, 1, 2, 3};
  return vbslq_f32(vcltq_s32(vld1q_s32(lanes), vdupq_n_s32(n)), a, vdupq_n_f32(other));
}

}  // namespace
