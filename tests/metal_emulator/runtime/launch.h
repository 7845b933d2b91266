// Binds a kernel's parameters: buffers by address, built-in positions from emulator::Thread.
#pragma once
#include "execution.h"

namespace emulator {
template <int i, class H, class... R> struct nth : nth<i - 1, R...> {};
template <class H, class... R> struct nth<0, H, R...> { using type = H; };
template <class S> struct signature;
template <class R, class... A> struct signature<R (*)(A...)> { template <int i> using argument = typename nth<i, A...>::type; };

template <class T> struct buffer_argument { static inline T bind(void* address) { return (T)address; } };
template <class T> struct buffer_argument<T&> { static inline T& bind(void* address) { return *(T*)address; } };

template <class T> struct position { static inline T bind(const unsigned* at) { return T(at[0]); } };
template <class E> struct position<metal::vec<E, 2>> { static inline metal::vec<E, 2> bind(const unsigned* at) { return {E(at[0]), E(at[1])}; } };
template <class E> struct position<metal::vec<E, 3>> { static inline metal::vec<E, 3> bind(const unsigned* at) { return {E(at[0]), E(at[1]), E(at[2])}; } };

struct GridPositions {
  unsigned position[3], size[3];
  inline explicit GridPositions(const Thread& t) {
    for (int i = 0; i < 3; i++) {
      position[i] = t.threadgroup[i] * t.threadgroup_size[i] + t.position_in_threadgroup[i];
      size[i] = t.threadgroups[i] * t.threadgroup_size[i];
    }
  }
};
}  // namespace emulator
