// Counter-based draws: Philox4x32-10 (Salmon et al. 2011) with the counters of csrc/random.hpp, the same bits.
#pragma once
#include "binary64.h"

/// What a draw is for.
enum Purpose { DRAFT = 0, ACCEPT = 1, RESIDUAL = 2, NOISE = 3, NOISE_TAIL = 4 };

METAL_FUNC uint4 philox(uint4 counter, ulong key) {
  uint k0 = uint(key), k1 = uint(key >> 32);
  for (int round = 0; round < 10; round++) {
    const ulong a = 0xD2511F53ul * counter.x, b = 0xCD9E8D57ul * counter.z;
    counter = uint4(uint(b >> 32) ^ counter.y ^ k0, uint(b), uint(a >> 32) ^ counter.w ^ k1, uint(a));
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

/// A binary64 in [0, 1) with 53 random bits, keyed by seed, round, position in the round, and purpose.
METAL_FUNC ulong uniform_draw(ulong seed, ulong round, uint position, uint purpose) {
  const uint4 bits = philox(uint4(uint(round), uint(round >> 32), position, purpose), seed);
  const ulong whole = b64_of_uint(((ulong(bits.x) << 32) | bits.y) >> 11);
  return whole == 0 ? 0 : whole - (53ul << 52);
}

/// The counter of a token's noise; its word is number token / 16 % 4.
METAL_FUNC uint4 noise_counter(uint token, ulong position, uint purpose) {
  return uint4(token / 64 * 16 + token % 16, uint(position), uint(position >> 32), purpose);
}

constant constexpr ulong B64_RECIPROCALS[11] = {0x3fa8618618618618ul, 0x3faaf286bca1af28ul, 0x3fae1e1e1e1e1e1eul,
                                                0x3fb1111111111111ul, 0x3fb3b13b13b13b14ul, 0x3fb745d1745d1746ul,
                                                0x3fbc71c71c71c71cul, 0x3fc2492492492492ul, 0x3fc999999999999aul,
                                                0x3fd5555555555555ul, 0x3ff0000000000000ul};  // 1/21, 1/19, .., 1

METAL_FUNC ulong twice_atanh(ulong s) {
  const ulong square = b64_multiply(s, s);
  ulong sum = 0;
  for (int i = 0; i < 11; i++) sum = b64_add(b64_multiply(sum, square), B64_RECIPROCALS[i]);
  return b64_multiply(b64_multiply(0x4000000000000000ul, s), sum);
}

/// -log(1 - u) for u in (0, 1).
METAL_FUNC ulong exponential(ulong u) {
  if (b64_less(u, 0x3fd0000000000000ul)) return twice_atanh(b64_divide(u, b64_subtract(0x4000000000000000ul, u)));
  const ulong rest = b64_subtract(B64_ONE, u);
  int exponent = int(rest >> 52) - 1023;
  ulong fraction = (rest & 0xffffffffffffful) | B64_ONE;
  if (b64_less(0x3ff6a09e667f3bcdul, fraction)) {  // sqrt(2)
    fraction -= 1ul << 52;
    exponent++;
  }
  const ulong whole = b64_of_uint(ulong(-exponent)) | (exponent < 0 ? B64_SIGN : 0ul);  // u >= 1/4: exponent <= 0
  const ulong ratio = b64_divide(b64_subtract(fraction, B64_ONE), b64_add(fraction, B64_ONE));
  return b64_add(b64_multiply(whole, 0x3fe62e42fefa39eful), twice_atanh(ratio)) ^ B64_SIGN;
}

/// The exponential noise of a token, whose word of purpose NOISE is known.
METAL_FUNC ulong noise_from(uint word, ulong seed, ulong position, uint token) {
  const uint4 tails = philox(noise_counter(token, position, NOISE_TAIL), seed);
  const ulong to_unit = 0x3df0000000000000ul;  // 2^-32
  const ulong tail = b64_add(b64_of_uint(tails[token / 16 % 4]), 0x3fe0000000000000ul);
  const ulong u = b64_multiply(b64_add(b64_of_uint(word), b64_multiply(tail, to_unit)), to_unit);
  const ulong most = 0x3feffffffffffffful;
  return exponential(b64_less(u, most) ? u : most);
}
