// Counter-based uniform numbers: the same key and counter give the same draw on every machine and in every layer.
#pragma once

#include <cstdint>

namespace specfast {

// Functions are static so that no instruction set's unit exports its copy.

/// What a draw is for; draws for different purposes are independent.
enum class Purpose : uint32_t { draft = 0, accept = 1, residual = 2, noise = 3, noise_tail = 4 };

struct Philox {
  uint32_t word[4];
};

/// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
static inline Philox philox(const uint32_t (&counter)[4], uint64_t key) noexcept {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

/// A draw in [0, 1) with 53 random bits, keyed by seed, round, position in the round, and purpose.
static inline double uniform(uint64_t seed, uint64_t round, uint32_t position, Purpose purpose) noexcept {
  const uint32_t counter[4] = {static_cast<uint32_t>(round), static_cast<uint32_t>(round >> 32), position,
                               static_cast<uint32_t>(purpose)};
  const Philox bits = philox(counter, seed);
  const uint64_t wide = (uint64_t{bits.word[0]} << 32) | bits.word[1];
  return static_cast<double>(wide >> 11) * 0x1.0p-53;
}

/// Tokens whose noise comes from the same counters, and the counters: token t is word t / 16 % 4 of counter t % 16 in
/// its group, so that vectors of any width hold tokens in order.
inline constexpr int kNoiseGroup = 64, kNoiseCounters = 16;

/// The random word of one token's noise, keyed by seed, position in the text, token and purpose.
static inline uint32_t noise_word(uint64_t seed, uint64_t position, int32_t token, Purpose purpose) noexcept {
  const uint32_t t = static_cast<uint32_t>(token);
  const uint32_t counter[4] = {t / kNoiseGroup * kNoiseCounters + t % kNoiseCounters, static_cast<uint32_t>(position),
                               static_cast<uint32_t>(position >> 32), static_cast<uint32_t>(purpose)};
  return philox(counter, seed).word[t / kNoiseCounters % 4];
}

}  // namespace specfast
