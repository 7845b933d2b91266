// Declarations only, for the lint: Metal's address spaces as clang's, vectors as clang's own, functions as strict as Metal's
// overloads (max(float, int) is ambiguous there). Never executed.
#pragma once
#include "integers.h"
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2))) const
#define threadgroup __attribute__((address_space(3)))
#define thread
#define METAL_FUNC inline __attribute__((always_inline))
#define INFINITY __builtin_huge_valf()
#define HUGE_VALF __builtin_huge_valf()
#define NAN __builtin_nanf("")
#define MAXFLOAT 3.402823466e+38f
#define M_PI_F 3.14159265f
#define M_LN2_F 0.69314718f
#define M_LOG2E_F 1.44269504f
#define M_SQRT1_2_F 0.70710678f

namespace metal {
typedef _Float16 half;
typedef __bf16 bfloat;
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
#define VECTORS(T) typedef vec<T, 2> T##2; typedef vec<T, 3> T##3; typedef vec<T, 4> T##4;
VECTORS(bool) VECTORS(char) VECTORS(uchar) VECTORS(short) VECTORS(ushort) VECTORS(int) VECTORS(uint) VECTORS(long) VECTORS(ulong)
VECTORS(half) VECTORS(bfloat) VECTORS(float)

// ---- traits
template <class T, T v> struct integral_constant { static constexpr T value = v; constexpr operator T() const { return v; } };
template <bool b> using bool_constant = integral_constant<bool, b>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;
template <class A, class B> constexpr bool is_same_v = __is_same(A, B);
template <class A, class B> struct is_same : bool_constant<__is_same(A, B)> {};
template <bool, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool b, class T = void> using enable_if_t = typename enable_if<b, T>::type;
template <bool, class A, class> struct conditional { using type = A; };
template <class A, class B> struct conditional<false, A, B> { using type = B; };
template <bool b, class A, class B> using conditional_t = typename conditional<b, A, B>::type;
template <class T> struct same { using type = T; };
template <class T> using same_t = typename same<T>::type;
template <class T> constexpr bool is_float_v = __is_same(T, float) || __is_same(T, half) || __is_same(T, bfloat);
template <class T> constexpr bool is_integral_v = __is_integral(T);
template <class T> constexpr bool is_floating_point_v = is_float_v<T>;
template <class T> struct numeric_limits {
  static constexpr T max();
  static constexpr T min();
  static constexpr T lowest();
  static constexpr T infinity();
  static constexpr T quiet_NaN();
  static constexpr T epsilon();
};

// ---- constructors: the lint writes float4(...) and vec<T, 4>(...) as make<...>(...)
template <class T> struct shape { using element = T; static constexpr int size = 1; };
template <class T, int N> struct shape<vec<T, N>> { using element = T; static constexpr int size = N; };
template <class T> using element_t = typename shape<T>::element;
template <class V, class... A> inline V make(A...) {
  constexpr int given = (shape<A>::size + ...);
  static_assert(given == shape<V>::size || (sizeof...(A) == 1 && given == 1), "wrong number of components for this vector");
  return V{};
}
template <class D, class S> D as_type(S) { static_assert(sizeof(D) == sizeof(S), "as_type needs types of one size"); return D{}; }

// ---- mathematics
#define UNARY(name) \
  template <class T> enable_if_t<is_float_v<element_t<T>>, T> name(T); \
  template <class T> enable_if_t<__is_integral(T), float> name(T) { static_assert(sizeof(T) == 0, #name " of an integer is ambiguous"); }
#define FLOATS(X) X(exp) X(exp2) X(exp10) X(log) X(log2) X(log10) X(sqrt) X(rsqrt) X(sin) X(cos) X(tan) X(asin) X(acos) X(atan) X(sinh) \
  X(cosh) X(tanh) X(asinh) X(acosh) X(atanh) X(floor) X(ceil) X(rint) X(round) X(trunc) X(fabs) X(sign)
FLOATS(UNARY)
#define NAMED_ACCURACY(name) float name(float);
namespace precise { FLOATS(NAMED_ACCURACY) float divide(float, float); float pow(float, float); float sincos(float, float&); }
namespace fast { FLOATS(NAMED_ACCURACY) float divide(float, float); float pow(float, float); float sincos(float, float&); }
template <class T> T abs(T);
template <class T> T max(T, T);
template <class T> T min(T, T);
template <class T> T clamp(T, T, T);
template <class T> T fma(T, T, T);
template <class T> T mix(T, T, T);
template <class T> T pow(T, T);
template <class T> T powr(T, T);
template <class T> T fmod(T, T);
template <class T> T fmin(T, T);
template <class T> T fmax(T, T);
template <class T> T atan2(T, T);
template <class T> T copysign(T, T);
template <class T> T ldexp(T, int);
template <class T> T select(T, T, bool);
template <class T, int N, class C> vec<T, N> select(vec<T, N>, vec<T, N>, C);  // clang compares vectors to integers
template <class T> T sincos(T, thread T&);
template <class T> bool isnan(T);
template <class T> bool isinf(T);
template <class T> bool isfinite(T);
template <class T> bool signbit(T);
template <class T, int N> T dot(vec<T, N>, vec<T, N>);
template <class V> bool any(V);
template <class V> bool all(V);
template <class T> T popcount(T);
template <class T> T clz(T);
template <class T> T ctz(T);
template <class T> T mulhi(T, T);
template <class T> T rotate(T, T);
template <class T> T reverse_bits(T);
template <class T> T extract_bits(T, uint, uint);

// ---- execution
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
mem_flags operator|(mem_flags, mem_flags);
enum memory_order { memory_order_relaxed = 0 };
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
template <class T> constexpr bool simd_type_v = sizeof(element_t<T>) <= 4 && !__is_same(element_t<T>, bool) && (__is_integral(element_t<T>) || is_float_v<element_t<T>>);
#define COLLECTIVE(name, ...) \
  template <class T> T name(T value __VA_ARGS__) { static_assert(simd_type_v<T>, #name " takes numbers of 32 or 16 bits, or vectors of them"); return value; }
COLLECTIVE(simd_sum) COLLECTIVE(simd_product) COLLECTIVE(simd_max) COLLECTIVE(simd_min) COLLECTIVE(simd_or) COLLECTIVE(simd_and) COLLECTIVE(simd_xor)
COLLECTIVE(simd_prefix_inclusive_sum) COLLECTIVE(simd_prefix_exclusive_sum) COLLECTIVE(simd_broadcast_first) COLLECTIVE(quad_sum)
COLLECTIVE(simd_shuffle, , ushort) COLLECTIVE(simd_broadcast, , ushort) COLLECTIVE(simd_shuffle_xor, , ushort)
COLLECTIVE(simd_shuffle_down, , ushort) COLLECTIVE(simd_shuffle_up, , ushort)
struct simd_vote { explicit operator ulong() const; bool all() const; bool any() const; };
simd_vote simd_ballot(bool);
bool simd_any(bool);
bool simd_all(bool);
bool simd_is_first();

template <class T, int R = 8, int C = 8> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8 && is_float_v<T>, "simdgroup matrices are 8x8 of floats");
  vec<T, 2> elements;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T);
  thread vec<T, 2>& thread_elements();
  const thread vec<T, 2>& thread_elements() const;
};
using simdgroup_float8x8 = simdgroup_matrix<float>;
using simdgroup_half8x8 = simdgroup_matrix<half>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat>;
template <class T, int R, int C> simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T);
template <class T> void simdgroup_load(thread simdgroup_matrix<T>&, const device T*, ulong = 8, ulong2 = 0, bool = false);
template <class T> void simdgroup_load(thread simdgroup_matrix<T>&, const threadgroup T*, ulong = 8, ulong2 = 0, bool = false);
template <class T> void simdgroup_store(simdgroup_matrix<T>, device T*, ulong = 8, ulong2 = 0, bool = false);
template <class T> void simdgroup_store(simdgroup_matrix<T>, threadgroup T*, ulong = 8, ulong2 = 0, bool = false);
template <class D, class A, class B, class C> void simdgroup_multiply_accumulate(thread simdgroup_matrix<D>&, simdgroup_matrix<A>, simdgroup_matrix<B>, simdgroup_matrix<C>);
template <class D, class A, class B> void simdgroup_multiply(thread simdgroup_matrix<D>&, simdgroup_matrix<A>, simdgroup_matrix<B>);

template <class T> struct atomic { T value; };
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
#define ATOMIC(space)                                                                                     \
  template <class T> T atomic_load_explicit(const volatile space atomic<T>*, memory_order);               \
  template <class T> void atomic_store_explicit(volatile space atomic<T>*, same_t<T>, memory_order);      \
  template <class T> T atomic_exchange_explicit(volatile space atomic<T>*, same_t<T>, memory_order);      \
  template <class T> T atomic_fetch_add_explicit(volatile space atomic<T>*, same_t<T>, memory_order);     \
  template <class T> T atomic_fetch_sub_explicit(volatile space atomic<T>*, same_t<T>, memory_order);     \
  template <class T> T atomic_fetch_or_explicit(volatile space atomic<T>*, same_t<T>, memory_order);      \
  template <class T> T atomic_fetch_and_explicit(volatile space atomic<T>*, same_t<T>, memory_order);     \
  template <class T> T atomic_fetch_xor_explicit(volatile space atomic<T>*, same_t<T>, memory_order);     \
  template <class T> T atomic_fetch_max_explicit(volatile space atomic<T>*, same_t<T>, memory_order);     \
  template <class T> T atomic_fetch_min_explicit(volatile space atomic<T>*, same_t<T>, memory_order);     \
  template <class T> bool atomic_compare_exchange_weak_explicit(volatile space atomic<T>*, thread T*, same_t<T>, memory_order, memory_order);
ATOMIC(device) ATOMIC(threadgroup)
}  // namespace metal
