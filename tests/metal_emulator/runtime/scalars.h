// The scalar types of the Metal Shading Language, their traits and 16-bit floats that round after every operation.
#pragma once

#include "integers.h"

#ifdef __CUDACC_RTC__
#define EMULATOR_CUDA 1
#define EMULATOR_COPY(to, from, bytes) ::memcpy(to, from, bytes)
#else
#if defined(__clang__) || defined(__aarch64__)
typedef __fp16 emulator_float16;
#else
typedef _Float16 emulator_float16;
#endif
#define EMULATOR_COPY(to, from, bytes) __builtin_memcpy(to, from, bytes)
#endif
#define METAL_FUNC inline __attribute__((always_inline))
#define INFINITY (__builtin_bit_cast(float, 0x7f800000u))
#define HUGE_VALF INFINITY
#define NAN (__builtin_bit_cast(float, 0x7fc00000u))
#define MAXFLOAT 3.402823466e+38f
#define M_PI_F 3.14159265358979323846f
#define M_LN2_F 0.69314718055994530942f
#define M_LOG2E_F 1.44269504088896340736f
#define M_SQRT1_2_F 0.70710678118654752440f

namespace metal {
typedef unsigned long size_t;
typedef long ptrdiff_t;

struct half;
struct bfloat;

// ---- traits
template <class T> struct type_identity { using type = T; };
template <class T> using same_t = typename type_identity<T>::type;  // not deduced
template <class T, T v> struct integral_constant {
  static constexpr T value = v;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return v; }
};
template <bool b> using bool_constant = integral_constant<bool, b>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;
template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <class A, class B> constexpr bool is_same_v = is_same<A, B>::value;
template <bool, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool b, class T = void> using enable_if_t = typename enable_if<b, T>::type;
template <bool, class A, class> struct conditional { using type = A; };
template <class A, class B> struct conditional<false, A, B> { using type = B; };
template <bool b, class A, class B> using conditional_t = typename conditional<b, A, B>::type;
template <class T> struct remove_cv { using type = T; };
template <class T> struct remove_cv<const T> { using type = T; };
template <class T> struct remove_cv<volatile T> { using type = T; };
template <class T> using remove_cv_t = typename remove_cv<T>::type;
template <class T> struct remove_reference { using type = T; };
template <class T> struct remove_reference<T&> { using type = T; };
template <class T> struct remove_reference<T&&> { using type = T; };
template <class T> using remove_reference_t = typename remove_reference<T>::type;
template <class T> using remove_addrspace_t = T;
template <class...> using void_t = void;
template <class T> T&& declval();
template <class T> constexpr bool is_empty_v = __is_empty(T);
template <class T> struct is_empty : bool_constant<__is_empty(T)> {};

template <class T, class... U> constexpr bool is_any_of = (is_same_v<remove_cv_t<T>, U> || ...);
template <class T> constexpr bool is_integral_v = is_any_of<T, bool, char, signed char, unsigned char, short, ushort, int, uint,
                                                             long, ulong, long long, unsigned long long>;
template <class T> constexpr bool is_floating_point_v = is_any_of<T, float, half, bfloat>;
template <class T> constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T> constexpr bool is_unsigned_v = is_any_of<T, bool, uchar, ushort, uint, ulong, unsigned long long>;
template <class T> struct is_integral : bool_constant<is_integral_v<T>> {};
template <class T> struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T> struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class T> struct is_unsigned : bool_constant<is_unsigned_v<T>> {};
template <class T> constexpr bool is_native_v = is_integral_v<T> || is_any_of<T, float, double>;

template <class D, class S>
inline D as_type(const S& source) {
  static_assert(sizeof(D) == sizeof(S), "as_type needs types of one size");
  D result;
  EMULATOR_COPY(&result, &source, sizeof(D));
  return result;
}

// ---- 16-bit floats
struct half_format {
  static inline float widen(uint16_t bits) {
#ifdef EMULATOR_CUDA
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    emulator_float16 value;
    EMULATOR_COPY(&value, &bits, 2);
    return (float)value;
#endif
  }
  static inline uint16_t round(float value) {
    uint16_t bits;
#ifdef EMULATOR_CUDA
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    emulator_float16 rounded = (emulator_float16)value;
    EMULATOR_COPY(&bits, &rounded, 2);
#endif
    return bits;
  }
};
struct bfloat_format {
  static inline float widen(uint16_t bits) { return as_type<float>((uint)bits << 16); }
  static inline uint16_t round(float value) {
    uint bits = as_type<uint>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);  // NaN stays NaN
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);                 // ties to even
  }
};
struct bit_pattern { uint16_t bits; };

#define EMULATOR_FLOAT16(F)                                                                                          \
  struct F {                                                                                                         \
    uint16_t bits;                                                                                                   \
    F() = default;                                                                                                   \
    constexpr F(bit_pattern pattern) : bits(pattern.bits) {}                                                         \
    template <class U, class = enable_if_t<is_native_v<U>>> inline F(U value) : bits(F##_format::round((float)value)) {} \
    template <class U, class = enable_if_t<is_any_of<U, half, bfloat> && !is_same_v<U, F>>, class = void>            \
    inline explicit F(U value) : bits(F##_format::round(float(value))) {}                                            \
    inline operator float() const { return F##_format::widen(bits); }                                                \
    template <class U> inline F& operator+=(U other) { return *this = F(float(*this) + float(other)); }              \
    template <class U> inline F& operator-=(U other) { return *this = F(float(*this) - float(other)); }              \
    template <class U> inline F& operator*=(U other) { return *this = F(float(*this) * float(other)); }              \
    template <class U> inline F& operator/=(U other) { return *this = F(float(*this) / float(other)); }              \
  };                                                                                                                 \
  inline F operator-(F a) { return F(bit_pattern{(uint16_t)(a.bits ^ 0x8000)}); }                                    \
  EMULATOR_FLOAT16_OPERATOR(F, +) EMULATOR_FLOAT16_OPERATOR(F, -) EMULATOR_FLOAT16_OPERATOR(F, *) EMULATOR_FLOAT16_OPERATOR(F, /)
// with a float the result is float, with an integer it stays 16 bits wide
#define EMULATOR_FLOAT16_OPERATOR(F, op)                                                         \
  inline F operator op(F a, F b) { return F(float(a) op float(b)); }                             \
  template <class U, class = enable_if_t<is_native_v<U>>> inline auto operator op(F a, U b) {    \
    return conditional_t<is_integral_v<U>, F, float>(float(a) op float(b));                      \
  }                                                                                              \
  template <class U, class = enable_if_t<is_native_v<U>>> inline auto operator op(U a, F b) {    \
    return conditional_t<is_integral_v<U>, F, float>(float(a) op float(b));                      \
  }
EMULATOR_FLOAT16(half)
EMULATOR_FLOAT16(bfloat)

// ---- limits
template <class T> struct numeric_limits;
template <class T, bool is_signed_> struct integer_limits {
  static constexpr bool is_signed = is_signed_;
  static constexpr int digits = sizeof(T) * 8 - is_signed_;
  static constexpr T max() { return is_signed_ ? T((1ul << digits) - 1) : T(~T(0)); }
  static constexpr T min() { return is_signed_ ? T(-T(max()) - 1) : T(0); }
  static constexpr T lowest() { return min(); }
};
template <> struct numeric_limits<char> : integer_limits<char, true> {};
template <> struct numeric_limits<signed char> : integer_limits<signed char, true> {};
template <> struct numeric_limits<uchar> : integer_limits<uchar, false> {};
template <> struct numeric_limits<short> : integer_limits<short, true> {};
template <> struct numeric_limits<ushort> : integer_limits<ushort, false> {};
template <> struct numeric_limits<int> : integer_limits<int, true> {};
template <> struct numeric_limits<uint> : integer_limits<uint, false> {};
template <> struct numeric_limits<long> : integer_limits<long, true> {};
template <> struct numeric_limits<ulong> : integer_limits<ulong, false> {};
template <> struct numeric_limits<float> {
  static constexpr float max() { return MAXFLOAT; }
  static constexpr float lowest() { return -MAXFLOAT; }
  static constexpr float min() { return 1.175494351e-38f; }
  static constexpr float epsilon() { return 1.1920929e-7f; }
  static constexpr float infinity() { return INFINITY; }
  static constexpr float quiet_NaN() { return NAN; }
};
template <class F, uint16_t largest, uint16_t smallest, uint16_t infinite> struct float16_limits {
  static constexpr F max() { return F(bit_pattern{largest}); }
  static constexpr F lowest() { return F(bit_pattern{(uint16_t)(largest | 0x8000)}); }
  static constexpr F min() { return F(bit_pattern{smallest}); }
  static constexpr F infinity() { return F(bit_pattern{infinite}); }
};
template <> struct numeric_limits<half> : float16_limits<half, 0x7bff, 0x0400, 0x7c00> {};
template <> struct numeric_limits<bfloat> : float16_limits<bfloat, 0x7f7f, 0x0080, 0x7f80> {};
}  // namespace metal
