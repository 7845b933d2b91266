// Metal's mathematical functions on scalars and vectors. CPU and CUDA use their own libm: equal within a few units, not in bits.
#pragma once
#include "vectors.h"

#ifdef EMULATOR_CUDA
#define EMULATOR_LIBM(name) ::name##f
#else
#define EMULATOR_LIBM(name) __builtin_##name##f
#endif

namespace metal {
#define EMULATOR_UNARY(X)                                                                                       \
  X(exp) X(exp2) X(log) X(log2) X(log10) X(sqrt) X(sin) X(cos) X(tan) X(asin) X(acos) X(atan) X(sinh) X(cosh)     \
  X(tanh) X(asinh) X(acosh) X(atanh) X(floor) X(ceil) X(rint) X(round) X(trunc) X(fabs)
#define X(name)                                                                                                 \
  inline float name(float x) { return EMULATOR_LIBM(name)(x); }                                                 \
  inline half name(half x) { return half(EMULATOR_LIBM(name)(float(x))); }                                      \
  inline bfloat name(bfloat x) { return bfloat(EMULATOR_LIBM(name)(float(x))); }                                \
  template <class T, class = enable_if_t<is_integral_v<T>>> inline float name(T x) { return EMULATOR_LIBM(name)((float)x); } \
  template <class T, int N> inline vec<T, N> name(vec<T, N> x) { for (int i = 0; i < N; i++) x[i] = name(x[i]); return x; }
EMULATOR_UNARY(X)
#undef X
inline float rsqrt(float x) { return 1.0f / metal::sqrt(x); }
inline half rsqrt(half x) { return half(1.0f / metal::sqrt(float(x))); }
inline float exp10(float x) { return EMULATOR_LIBM(pow)(10.0f, x); }
inline float pow(float a, float b) { return EMULATOR_LIBM(pow)(a, b); }
inline float powr(float a, float b) { return EMULATOR_LIBM(pow)(a, b); }
inline float fmod(float a, float b) { return EMULATOR_LIBM(fmod)(a, b); }
inline float atan2(float a, float b) { return EMULATOR_LIBM(atan2)(a, b); }
inline float copysign(float a, float b) { return EMULATOR_LIBM(copysign)(a, b); }
inline float ldexp(float a, int e) { return EMULATOR_LIBM(ldexp)(a, e); }
inline float frexp(float a, int& e) { return EMULATOR_LIBM(frexp)(a, &e); }
inline float sincos(float x, float& cosine) { cosine = metal::cos(x); return metal::sin(x); }

// The two accuracies of Metal are one here.
#define X(name) inline float name(float x) { return metal::name(x); }
#define EMULATOR_NAMED_ACCURACY EMULATOR_UNARY(X) X(rsqrt) \
  inline float divide(float a, float b) { return a / b; }  \
  inline float pow(float a, float b) { return metal::pow(a, b); } \
  inline float sincos(float x, float& cosine) { return metal::sincos(x, cosine); }
namespace precise { EMULATOR_NAMED_ACCURACY }
namespace fast { EMULATOR_NAMED_ACCURACY }
#undef X

inline float fma(float a, float b, float c) { return EMULATOR_LIBM(fma)(a, b, c); }
inline half fma(half a, half b, half c) { return half(EMULATOR_LIBM(fma)(float(a), float(b), float(c))); }
template <class T, int N> inline vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  for (int i = 0; i < N; i++) a[i] = fma(a[i], b[i], c[i]);
  return a;
}
inline float mix(float a, float b, float t) { return a + (b - a) * t; }
inline bool isnan(float x) { return x != x; }
inline bool isinf(float x) { return x == INFINITY || x == -INFINITY; }
inline bool isfinite(float x) { return !isnan(x) && !isinf(x); }
inline bool signbit(float x) { return as_type<uint>(x) >> 31; }
inline float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f; }

// A NaN loses against a number, as in Metal's fmin and fmax.
inline float fmin(float a, float b) { return isnan(a) ? b : isnan(b) ? a : b < a ? b : a; }
inline float fmax(float a, float b) { return isnan(a) ? b : isnan(b) ? a : a < b ? b : a; }
inline float min(float a, float b) { return fmin(a, b); }
inline float max(float a, float b) { return fmax(a, b); }
#define X(T)                                       \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
X(char) X(signed char) X(uchar) X(short) X(ushort) X(int) X(uint) X(long) X(ulong) X(half) X(bfloat)
#undef X
template <class T, int N> inline vec<T, N> min(vec<T, N> a, vec<T, N> b) { for (int i = 0; i < N; i++) a[i] = min(a[i], b[i]); return a; }
template <class T, int N> inline vec<T, N> max(vec<T, N> a, vec<T, N> b) { for (int i = 0; i < N; i++) a[i] = max(a[i], b[i]); return a; }
template <class T> inline T clamp(T x, same_t<T> low, same_t<T> high) { return min(max(x, low), high); }
template <class T, class = enable_if_t<is_integral_v<T>>> inline T abs(T x) { return x < 0 ? T(-x) : x; }
inline float abs(float x) { return fabs(x); }
inline half abs(half x) { return fabs(x); }
inline bfloat abs(bfloat x) { return fabs(x); }
template <class T, int N> inline vec<T, N> abs(vec<T, N> a) { for (int i = 0; i < N; i++) a[i] = abs(a[i]); return a; }
template <class T> inline T select(T a, same_t<T> b, bool c) { return c ? b : a; }
template <class T, int N> inline vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) {
  for (int i = 0; i < N; i++) a[i] = c[i] ? b[i] : a[i];
  return a;
}

#ifdef EMULATOR_CUDA
inline uint popcount(uint x) { return __popc(x); }
inline uint clz(uint x) { return __clz(x); }
inline uint ctz(uint x) { return x ? __ffs(x) - 1 : 32; }
inline ulong mulhi(ulong a, ulong b) { return __umul64hi(a, b); }
#else
inline uint popcount(uint x) { return __builtin_popcount(x); }
inline uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
inline uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
inline ulong mulhi(ulong a, ulong b) { return (ulong)(((unsigned __int128)a * b) >> 64); }
#endif
inline uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
inline uint rotate(uint x, uint n) { return (x << (n & 31)) | (x >> ((32 - n) & 31)); }
inline uint reverse_bits(uint x) { uint r = 0; for (int i = 0; i < 32; i++) r |= ((x >> i) & 1u) << (31 - i); return r; }
inline uint extract_bits(uint x, uint offset, uint bits) { return bits == 0 ? 0 : (x >> offset) & (bits >= 32 ? ~0u : (1u << bits) - 1); }
}  // namespace metal
