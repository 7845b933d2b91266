// vec<T, 2>, vec<T, 3> and vec<T, 4>. A swizzle `v.zx` arrives here as `v.zx()` (the translator adds the parentheses) and
// can be read; assigning to one does not compile.
#pragma once
#include "scalars.h"

namespace metal {
template <class T, int N> struct vec;
template <class T> struct shape_of { using element = T; static constexpr int size = 1; };
template <class T, int N> struct shape_of<vec<T, N>> { using element = T; static constexpr int size = N; };

#define EMULATOR_SWIZZLE(name, ...) inline auto name() const { return pick(__VA_ARGS__); }
#define EMULATOR_COMPOUND(op)                                          \
  inline vec& operator op##=(vec other) & {                            \
    for (int i = 0; i < N; i++) (*this)[i] = T((*this)[i] op other[i]); \
    return *this;                                                      \
  }
#define EMULATOR_VEC_MEMBERS                                                                                   \
  using element = T;                                                                                           \
  vec() = default;                                                                                             \
  vec(const vec&) = default;                                                                                   \
  vec& operator=(const vec&) & = default; /* not to a swizzle: it is a copy */                                 \
  inline vec(same_t<T> value) { for (int i = 0; i < N; i++) (*this)[i] = value; }                              \
  template <class U> inline explicit vec(vec<U, N> other) { for (int i = 0; i < N; i++) (*this)[i] = T(other[i]); } \
  template <class A, class B, class... R> inline vec(A a, B b, R... rest) { int at = 0; put(at, a); put(at, b); (put(at, rest), ...); } \
  template <class A> inline void put(int& at, const A& a) {                                                    \
    if constexpr (shape_of<A>::size == 1) (*this)[at++] = T(a);                                                \
    else for (int i = 0; i < shape_of<A>::size; i++) (*this)[at++] = T(a[i]);                                  \
  }                                                                                                            \
  template <class... I> inline auto pick(I... i) const { return vec<T, sizeof...(I)>((*this)[i]...); }         \
  EMULATOR_COMPOUND(+) EMULATOR_COMPOUND(-) EMULATOR_COMPOUND(*) EMULATOR_COMPOUND(/) EMULATOR_COMPOUND(%)     \
  EMULATOR_COMPOUND(&) EMULATOR_COMPOUND(|) EMULATOR_COMPOUND(^) EMULATOR_COMPOUND(<<) EMULATOR_COMPOUND(>>)

template <class T> struct alignas(2 * sizeof(T)) vec<T, 2> {
  static constexpr int N = 2;
  T x, y;
  inline T& operator[](int i) { return i == 0 ? x : y; }
  inline const T& operator[](int i) const { return i == 0 ? x : y; }
  EMULATOR_VEC_MEMBERS
  EMULATOR_SWIZZLE(xy, 0, 1) EMULATOR_SWIZZLE(yx, 1, 0) EMULATOR_SWIZZLE(xx, 0, 0) EMULATOR_SWIZZLE(yy, 1, 1)
};
template <class T> struct alignas(4 * sizeof(T)) vec<T, 3> {  // takes the room of four, as in Metal
  static constexpr int N = 3;
  T x, y, z;
  inline T& operator[](int i) { return i == 0 ? x : i == 1 ? y : z; }
  inline const T& operator[](int i) const { return i == 0 ? x : i == 1 ? y : z; }
  EMULATOR_VEC_MEMBERS
  EMULATOR_SWIZZLE(xy, 0, 1) EMULATOR_SWIZZLE(yz, 1, 2) EMULATOR_SWIZZLE(xz, 0, 2) EMULATOR_SWIZZLE(zyx, 2, 1, 0)
};
template <class T> struct alignas(4 * sizeof(T)) vec<T, 4> {
  static constexpr int N = 4;
  T x, y, z, w;
  inline T& operator[](int i) { return i == 0 ? x : i == 1 ? y : i == 2 ? z : w; }
  inline const T& operator[](int i) const { return i == 0 ? x : i == 1 ? y : i == 2 ? z : w; }
  EMULATOR_VEC_MEMBERS
  EMULATOR_SWIZZLE(xy, 0, 1) EMULATOR_SWIZZLE(zw, 2, 3) EMULATOR_SWIZZLE(xz, 0, 2) EMULATOR_SWIZZLE(yw, 1, 3)
  EMULATOR_SWIZZLE(xyz, 0, 1, 2) EMULATOR_SWIZZLE(yzw, 1, 2, 3) EMULATOR_SWIZZLE(wzyx, 3, 2, 1, 0)
  EMULATOR_SWIZZLE(yxwz, 1, 0, 3, 2) EMULATOR_SWIZZLE(zwxy, 2, 3, 0, 1)
};

// `result(element operation)` lane by lane; a scalar operand is converted to the element type first.
#define EMULATOR_LANEWISE(R, op)                                                                          \
  template <class T, int N> inline vec<R, N> operator op(vec<T, N> a, vec<T, N> b) {                      \
    vec<R, N> r;                                                                                          \
    for (int i = 0; i < N; i++) r[i] = R(a[i] op b[i]);                                                   \
    return r;                                                                                             \
  }                                                                                                       \
  template <class T, int N> inline vec<R, N> operator op(vec<T, N> a, same_t<T> b) { return a op vec<T, N>(b); } \
  template <class T, int N> inline vec<R, N> operator op(same_t<T> a, vec<T, N> b) { return vec<T, N>(a) op b; }
EMULATOR_LANEWISE(T, +) EMULATOR_LANEWISE(T, -) EMULATOR_LANEWISE(T, *) EMULATOR_LANEWISE(T, /) EMULATOR_LANEWISE(T, %)
EMULATOR_LANEWISE(T, &) EMULATOR_LANEWISE(T, |) EMULATOR_LANEWISE(T, ^) EMULATOR_LANEWISE(T, <<) EMULATOR_LANEWISE(T, >>)
EMULATOR_LANEWISE(bool, <) EMULATOR_LANEWISE(bool, >) EMULATOR_LANEWISE(bool, <=) EMULATOR_LANEWISE(bool, >=)
EMULATOR_LANEWISE(bool, ==) EMULATOR_LANEWISE(bool, !=)
template <class T, int N> inline vec<T, N> operator-(vec<T, N> a) { for (int i = 0; i < N; i++) a[i] = T(-a[i]); return a; }
template <class T, int N> inline vec<T, N> operator~(vec<T, N> a) { for (int i = 0; i < N; i++) a[i] = T(~a[i]); return a; }
template <int N> inline vec<bool, N> operator!(vec<bool, N> a) { for (int i = 0; i < N; i++) a[i] = !a[i]; return a; }
template <int N> inline bool any(vec<bool, N> a) { bool r = false; for (int i = 0; i < N; i++) r |= a[i]; return r; }
template <int N> inline bool all(vec<bool, N> a) { bool r = true; for (int i = 0; i < N; i++) r &= a[i]; return r; }
template <class T, int N> inline T dot(vec<T, N> a, vec<T, N> b) {
  T sum = T(a[0] * b[0]);
  for (int i = 1; i < N; i++) sum = T(sum + a[i] * b[i]);
  return sum;
}

#define EMULATOR_VECTORS(T) using T##2 = vec<T, 2>; using T##3 = vec<T, 3>; using T##4 = vec<T, 4>;
EMULATOR_VECTORS(bool) EMULATOR_VECTORS(char) EMULATOR_VECTORS(uchar) EMULATOR_VECTORS(short) EMULATOR_VECTORS(ushort)
EMULATOR_VECTORS(int) EMULATOR_VECTORS(uint) EMULATOR_VECTORS(long) EMULATOR_VECTORS(ulong)
EMULATOR_VECTORS(half) EMULATOR_VECTORS(bfloat) EMULATOR_VECTORS(float)
struct packed_float2 { float x, y; };
struct packed_float3 { float x, y, z; };
}  // namespace metal
