// How threads meet: barriers, simdgroup collectives, 8x8 simdgroup matrices, atomics. On the CPU through runtime.cpp, on CUDA
// through warp shuffles. A reduction adds in the same order on both: a butterfly over distances 16, 8, 4, 2, 1.
#pragma once
#include "math.h"

namespace emulator {
// Where a thread stands; filled by runtime.cpp or by a CUDA kernel's first lines.
struct Thread {
  unsigned position_in_threadgroup[3], threadgroup[3], threadgroup_size[3], threadgroups[3];
  unsigned index, lane, simdgroup, simdgroups;
};
}  // namespace emulator

namespace metal {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
enum memory_order { memory_order_relaxed = 0 };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };
}  // namespace metal

#ifndef EMULATOR_CUDA
// ---- CPU: every collective names its line in the .metal file, so that a divergent one can be reported
namespace emulator {
constexpr unsigned slot_bytes = 64;
extern "C" {
Thread* emulator_thread();
void emulator_threadgroup_barrier(int flags, const char* file, int line);
void emulator_simdgroup_barrier(int flags, const char* file, int line);
void* emulator_threadgroup_memory(int site, unsigned long bytes);
// Deposits this lane's value and waits for the others; 32 slots of slot_bytes follow the returned address, then the result's.
unsigned char* emulator_exchange(const void* value, unsigned bytes, const char* operation, const char* file, int line);
bool emulator_claim_result();  // true for one lane per collective
void emulator_set_result(const void* value, unsigned bytes);
}
template <class A> inline A& threadgroup_variable(int site) { return *(A*)emulator_threadgroup_memory(site, sizeof(A)); }
template <class T> struct Lanes {
  const unsigned char* slots;
  inline T operator[](unsigned lane) const {
    T value;
    __builtin_memcpy(&value, slots + slot_bytes * lane, sizeof(T));
    return value;
  }
  inline T result() const { return (*this)[32]; }
};
template <class T> inline Lanes<T> exchange(T value, const char* operation, const char* file, int line) {
  static_assert(sizeof(T) <= slot_bytes, "value too large for a simdgroup collective");
  return {emulator_exchange(&value, sizeof(T), operation, file, line)};
}
}  // namespace emulator
#define EMULATOR_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace metal {
inline uint lane_() { return emulator::emulator_thread()->lane; }
inline void threadgroup_barrier(mem_flags flags, EMULATOR_HERE) { emulator::emulator_threadgroup_barrier((int)flags, file, line); }
inline void simdgroup_barrier(mem_flags flags, EMULATOR_HERE) { emulator::emulator_simdgroup_barrier((int)flags, file, line); }
template <class T> inline T simd_shuffle(T v, ushort from, EMULATOR_HERE) { return emulator::exchange(v, "simd_shuffle", file, line)[from & 31]; }
template <class T> inline T simd_broadcast(T v, ushort from, EMULATOR_HERE) { return emulator::exchange(v, "simd_broadcast", file, line)[from & 31]; }
template <class T> inline T simd_broadcast_first(T v, EMULATOR_HERE) { return emulator::exchange(v, "simd_broadcast_first", file, line)[0]; }
template <class T> inline T simd_shuffle_xor(T v, ushort mask, EMULATOR_HERE) { return emulator::exchange(v, "simd_shuffle_xor", file, line)[(lane_() ^ mask) & 31]; }
template <class T> inline T simd_shuffle_down(T v, ushort delta, EMULATOR_HERE) {
  auto all = emulator::exchange(v, "simd_shuffle_down", file, line);
  return lane_() + delta < 32 ? all[lane_() + delta] : v;
}
template <class T> inline T simd_shuffle_up(T v, ushort delta, EMULATOR_HERE) {
  auto all = emulator::exchange(v, "simd_shuffle_up", file, line);
  return lane_() >= delta ? all[lane_() - delta] : v;
}
inline ulong ballot_(bool predicate, const char* file, int line) {
  auto all = emulator::exchange(predicate, "simd_ballot", file, line);
  ulong votes = 0;
  for (int i = 0; i < 32; i++) votes |= (ulong)all[i] << i;
  return votes;
}
#define EMULATOR_REDUCTION(name, combined)                                           \
  template <class T> inline T name(T v, EMULATOR_HERE) {                             \
    auto all = emulator::exchange(v, #name, file, line);                             \
    if (emulator::emulator_claim_result()) {                                         \
      T partial[32];                                                                 \
      for (int i = 0; i < 32; i++) partial[i] = all[i];                              \
      for (int distance = 16; distance; distance /= 2)                               \
        for (int i = 0; i < distance; i++) {                                         \
          T a = partial[i], b = partial[i + distance];                               \
          partial[i] = T(combined);                                                  \
        }                                                                            \
      emulator::emulator_set_result(partial, sizeof(T));                             \
    }                                                                                \
    return all.result();                                                             \
  }
template <class T> inline T simd_prefix_inclusive_sum(T v, EMULATOR_HERE) {
  auto all = emulator::exchange(v, "simd_prefix_inclusive_sum", file, line);
  T sums[32];
  for (int i = 0; i < 32; i++) sums[i] = all[i];
  for (int distance = 1; distance < 32; distance *= 2)
    for (int i = 31; i >= distance; i--) sums[i] = T(sums[i - distance] + sums[i]);
  return sums[lane_()];
}
template <class T> inline T simd_prefix_exclusive_sum(T v, EMULATOR_HERE) {
  T up = simd_shuffle_up(simd_prefix_inclusive_sum(v, file, line), 1, file, line);
  return lane_() == 0 ? T(0) : up;
}
#else
// ---- CUDA
#define EMULATOR_HERE int file = 0, int line = 0
namespace metal {
inline uint lane_() { uint lane; asm("mov.u32 %0, %%laneid;" : "=r"(lane)); return lane; }
inline void threadgroup_barrier(mem_flags) { __syncthreads(); }
inline void simdgroup_barrier(mem_flags) { __syncwarp(); }
template <class T, class F> inline T word_by_word(T value, F shuffle) {
  constexpr int words = (sizeof(T) + 3) / 4;
  uint bits[words] = {};
  EMULATOR_COPY(bits, &value, sizeof(T));
  for (int i = 0; i < words; i++) bits[i] = shuffle(bits[i]);
  EMULATOR_COPY(&value, bits, sizeof(T));
  return value;
}
template <class T> inline T simd_shuffle(T v, ushort from) { return word_by_word(v, [&](uint u) { return __shfl_sync(~0u, u, from); }); }
template <class T> inline T simd_broadcast(T v, ushort from) { return simd_shuffle(v, from); }
template <class T> inline T simd_broadcast_first(T v) { return simd_shuffle(v, 0); }
template <class T> inline T simd_shuffle_xor(T v, ushort mask) { return word_by_word(v, [&](uint u) { return __shfl_xor_sync(~0u, u, mask); }); }
template <class T> inline T simd_shuffle_down(T v, ushort delta) { return word_by_word(v, [&](uint u) { return __shfl_down_sync(~0u, u, delta); }); }
template <class T> inline T simd_shuffle_up(T v, ushort delta) { return word_by_word(v, [&](uint u) { return __shfl_up_sync(~0u, u, delta); }); }
inline ulong ballot_(bool predicate, int, int) { return __ballot_sync(~0u, predicate); }
#define EMULATOR_REDUCTION(name, combined)                    \
  template <class T> inline T name(T a) {                     \
    for (int distance = 16; distance; distance /= 2) {        \
      T b = simd_shuffle_xor(a, distance);                    \
      a = T(combined);                                        \
    }                                                         \
    return a;                                                 \
  }
template <class T> inline T simd_prefix_inclusive_sum(T v) {
  for (int distance = 1; distance < 32; distance *= 2) {
    T lower = simd_shuffle_up(v, distance);
    if (lane_() >= distance) v = T(lower + v);
  }
  return v;
}
template <class T> inline T simd_prefix_exclusive_sum(T v) {
  T up = simd_shuffle_up(simd_prefix_inclusive_sum(v), 1);
  return lane_() == 0 ? T(0) : up;
}
#endif
EMULATOR_REDUCTION(simd_sum, a + b)
EMULATOR_REDUCTION(simd_product, a * b)
EMULATOR_REDUCTION(simd_max, max(a, b))
EMULATOR_REDUCTION(simd_min, min(a, b))
EMULATOR_REDUCTION(simd_or, a | b)
EMULATOR_REDUCTION(simd_and, a & b)
EMULATOR_REDUCTION(simd_xor, a ^ b)
#ifdef EMULATOR_CUDA
template <class T> inline T quad_sum(T v) { v = T(v + simd_shuffle_xor(v, 2)); return T(v + simd_shuffle_xor(v, 1)); }
#else
template <class T> inline T quad_sum(T v, EMULATOR_HERE) {
  auto all = emulator::exchange(v, "quad_sum", file, line);
  uint first = lane_() & ~3u;
  return T(T(all[first] + all[first + 2]) + T(all[first + 1] + all[first + 3]));
}
#endif
struct simd_vote {
  ulong votes;
  explicit operator ulong() const { return votes; }
  bool all() const { return votes == 0xffffffffu; }
  bool any() const { return votes != 0; }
};
inline simd_vote simd_ballot(bool predicate, EMULATOR_HERE) { return {ballot_(predicate, file, line)}; }
inline bool simd_any(bool predicate, EMULATOR_HERE) { return ballot_(predicate, file, line) != 0; }
inline bool simd_all(bool predicate, EMULATOR_HERE) { return ballot_(predicate, file, line) == 0xffffffffu; }
inline bool simd_is_first() { return lane_() == 0; }

// ---- 8x8 matrices: lane l holds (row, column) and (row, column + 1), in the layout of Apple's GPUs
template <class T, int R = 8, int C = 8> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "simdgroup matrices are 8x8");
  vec<T, 2> elements;
  simdgroup_matrix() = default;
  inline explicit simdgroup_matrix(T diagonal) {
    uint row = row_of(lane_()), column = column_of(lane_());
    elements = vec<T, 2>(row == column ? diagonal : T(0), row == column + 1 ? diagonal : T(0));
  }
  static inline uint row_of(uint lane) { return (lane / 16) * 4 + lane / 2 % 4; }
  static inline uint column_of(uint lane) { return lane / 8 % 2 * 4 + lane % 2 * 2; }
  static inline uint lane_of(uint row, uint column) { return row / 4 * 16 + column / 4 * 8 + row % 4 * 2 + column / 2 % 2; }
  inline vec<T, 2>& thread_elements() { return elements; }
  inline const vec<T, 2>& thread_elements() const { return elements; }
};
using simdgroup_float8x8 = simdgroup_matrix<float>;
using simdgroup_half8x8 = simdgroup_matrix<half>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat>;
template <class T, int R, int C> inline simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, R, C> m;
  m.elements = vec<T, 2>(value);
  return m;
}
template <class T> inline ulong matrix_offset_(uint j, ulong stride, ulong2 origin, bool transpose) {
  ulong row = simdgroup_matrix<T>::row_of(lane_()), column = simdgroup_matrix<T>::column_of(lane_()) + j;
  return transpose ? (origin.y + column) * stride + origin.x + row : (origin.y + row) * stride + origin.x + column;
}
template <class T>
inline void simdgroup_load(simdgroup_matrix<T>& m, const T* from, ulong stride = 8, ulong2 origin = ulong2(0), bool transpose = false) {
  for (uint j = 0; j < 2; j++) m.elements[j] = from[matrix_offset_<T>(j, stride, origin, transpose)];
}
template <class T>
inline void simdgroup_store(simdgroup_matrix<T> m, T* to, ulong stride = 8, ulong2 origin = ulong2(0), bool transpose = false) {
  for (uint j = 0; j < 2; j++) to[matrix_offset_<T>(j, stride, origin, transpose)] = m.elements[j];
}
// d = a b + c: products are added to c one after another along the inner dimension, in float.
template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D>& d, simdgroup_matrix<A> a, simdgroup_matrix<B> b, simdgroup_matrix<C> c,
                                          EMULATOR_HERE) {
  using M = simdgroup_matrix<D>;
  const uint row = M::row_of(lane_()), column = M::column_of(lane_());
  const float4 mine = float4(float(a.elements[0]), float(a.elements[1]), float(b.elements[0]), float(b.elements[1]));
  float2 sum = float2(float(c.elements[0]), float(c.elements[1]));
#ifdef EMULATOR_CUDA
  auto lane_value = [&](uint lane, uint i) { return simd_shuffle(mine[i], lane); };
  for (uint k = 0; k < 8; k++) {
    const float even = lane_value(M::lane_of(row, k), 0), odd = lane_value(M::lane_of(row, k), 1);
    sum += (k % 2 ? odd : even) * float2(lane_value(M::lane_of(k, column), 2), lane_value(M::lane_of(k, column), 3));
  }
#else
  auto all = emulator::exchange(mine, "simdgroup_multiply_accumulate", file, line);
  for (uint k = 0; k < 8; k++) {
    const float4 right = all[M::lane_of(k, column)];
    sum += all[M::lane_of(row, k)][k % 2] * float2(right.z, right.w);
  }
#endif
  d.elements = vec<D, 2>(D(sum.x), D(sum.y));
}
template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D>& d, simdgroup_matrix<A> a, simdgroup_matrix<B> b, EMULATOR_HERE) {
  const auto zero = make_filled_simdgroup_matrix<D, 8, 8>(D(0.0f));
#ifdef EMULATOR_CUDA
  simdgroup_multiply_accumulate(d, a, b, zero);
#else
  simdgroup_multiply_accumulate(d, a, b, zero, file, line);
#endif
}

// ---- atomics
template <class T> struct atomic { T value; };
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_float = atomic<float>;
#ifdef EMULATOR_CUDA
#define EMULATOR_ATOMIC(name, cuda, builtin)                                                                    \
  template <class T> inline T atomic_##name##_explicit(volatile atomic<T>* a, same_t<T> x, memory_order) { return ::cuda((T*)&a->value, x); }
#else
#define EMULATOR_ATOMIC(name, cuda, builtin)                                                                    \
  template <class T> inline T atomic_##name##_explicit(volatile atomic<T>* a, same_t<T> x, memory_order) {       \
    return builtin(&a->value, x, __ATOMIC_RELAXED);                                                             \
  }
#endif
EMULATOR_ATOMIC(fetch_add, atomicAdd, __atomic_fetch_add)
EMULATOR_ATOMIC(fetch_or, atomicOr, __atomic_fetch_or)
EMULATOR_ATOMIC(fetch_and, atomicAnd, __atomic_fetch_and)
EMULATOR_ATOMIC(fetch_xor, atomicXor, __atomic_fetch_xor)
EMULATOR_ATOMIC(exchange, atomicExch, __atomic_exchange_n)
template <class T> inline T atomic_fetch_sub_explicit(volatile atomic<T>* a, same_t<T> x, memory_order order) { return atomic_fetch_add_explicit(a, T(-x), order); }
template <class T> inline T atomic_load_explicit(const volatile atomic<T>* a, memory_order) {
#ifdef EMULATOR_CUDA
  return a->value;
#else
  T value;
  __atomic_load(&a->value, &value, __ATOMIC_RELAXED);
  return value;
#endif
}
template <class T> inline void atomic_store_explicit(volatile atomic<T>* a, same_t<T> x, memory_order) {
#ifdef EMULATOR_CUDA
  a->value = x;
#else
  __atomic_store(&a->value, &x, __ATOMIC_RELAXED);
#endif
}
#ifdef EMULATOR_CUDA
template <class T> inline T atomic_fetch_max_explicit(volatile atomic<T>* a, same_t<T> x, memory_order) { return ::atomicMax((T*)&a->value, x); }
template <class T> inline T atomic_fetch_min_explicit(volatile atomic<T>* a, same_t<T> x, memory_order) { return ::atomicMin((T*)&a->value, x); }
#else
template <class T>
inline bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* a, T* expected, same_t<T> x, memory_order, memory_order) {
  return __atomic_compare_exchange(&a->value, expected, &x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}
#define EMULATOR_ATOMIC_EXTREME(name, better)                                                              \
  template <class T> inline T atomic_##name##_explicit(volatile atomic<T>* a, same_t<T> x, memory_order order) { \
    T old = atomic_load_explicit(a, order);                                                                \
    while (x better old && !atomic_compare_exchange_weak_explicit(a, &old, x, order, order)) {             \
    }                                                                                                      \
    return old;                                                                                            \
  }
EMULATOR_ATOMIC_EXTREME(fetch_max, >)
EMULATOR_ATOMIC_EXTREME(fetch_min, <)
#endif
}  // namespace metal
