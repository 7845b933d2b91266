// IEEE 754 binary64 on integers, rounding to nearest even: laws are summed and compared as on the CPU, bit for bit, on
// GPUs that have no double. A number is its bits in a ulong. Results below the normal numbers become 0: nothing here
// comes near them. NaN and the infinities all become NaN.
#pragma once
#include <metal_stdlib>
using namespace metal;
#pragma METAL fp contract(off)
#pragma METAL fp math_mode(safe)

constant constexpr ulong B64_SIGN = 0x8000000000000000ul, B64_NAN = 0x7ff8000000000000ul;
constant constexpr ulong B64_ONE = 0x3ff0000000000000ul;

METAL_FUNC int b64_exponent(ulong a) {
  return int((a >> 52) & 0x7ff);
}
METAL_FUNC ulong b64_fraction(ulong a) {
  return (a & 0xffffffffffffful) | 0x10000000000000ul;
}
METAL_FUNC bool b64_is_zero(ulong a) {
  return (a & ~B64_SIGN) == 0;
}
METAL_FUNC bool b64_is_nan(ulong a) {
  return b64_exponent(a) == 0x7ff;
}

METAL_FUNC int leading_zeros(ulong a) {
  return (a >> 32) != 0 ? int(clz(uint(a >> 32))) : 32 + int(clz(uint(a)));
}

/// a >> n, the lowest bit set if a bit that was set is lost.
METAL_FUNC ulong shift_sticky(ulong a, int n) {
  if (n == 0) return a;
  return n < 64 ? (a >> n) | ((a << (64 - n)) != 0 ? 1ul : 0ul) : (a != 0 ? 1ul : 0ul);
}

/// The number 1.xxx * 2^(exponent - 1023) whose 56 bits, three of them to be rounded off, are `bits`.
METAL_FUNC ulong b64_rounded(ulong sign, int exponent, ulong bits) {
  const uint rest = uint(bits & 7);
  bits >>= 3;
  bits += (rest > 4 || (rest == 4 && (bits & 1) != 0)) ? 1 : 0;
  if (exponent <= 0) return sign;
  return sign | ((ulong(exponent) << 52) + (bits - 0x10000000000000ul));
}

METAL_FUNC ulong b64_add(ulong a, ulong b) {
  if (b64_is_nan(a) || b64_is_nan(b)) return B64_NAN;
  if ((a & ~B64_SIGN) < (b & ~B64_SIGN)) {
    const ulong c = a;
    a = b;
    b = c;
  }
  if (b64_is_zero(b)) return b64_is_zero(a) ? a & b : a;
  int exponent = b64_exponent(a);
  const ulong big = b64_fraction(a) << 3, small = shift_sticky(b64_fraction(b) << 3, exponent - b64_exponent(b));
  ulong bits;
  if (((a ^ b) & B64_SIGN) == 0) {
    bits = big + small;
    if ((bits >> 56) != 0) {
      bits = shift_sticky(bits, 1);
      exponent++;
    }
  } else {
    bits = big - small;
    if (bits == 0) return 0;
    const int shift = leading_zeros(bits) - 8;
    bits <<= shift;
    exponent -= shift;
  }
  return b64_rounded(a & B64_SIGN, exponent, bits);
}

METAL_FUNC ulong b64_subtract(ulong a, ulong b) {
  return b64_add(a, b ^ B64_SIGN);
}

METAL_FUNC ulong b64_multiply(ulong a, ulong b) {
  if (b64_is_nan(a) || b64_is_nan(b)) return B64_NAN;
  const ulong sign = (a ^ b) & B64_SIGN;
  if (b64_is_zero(a) || b64_is_zero(b)) return sign;
  const ulong x = b64_fraction(a), y = b64_fraction(b);
  const ulong x0 = x & 0xffffffff, x1 = x >> 32, y0 = y & 0xffffffff, y1 = y >> 32;
  const ulong middle = x1 * y0 + ((x0 * y0) >> 32);
  const ulong carry = x0 * y1 + (middle & 0xffffffff);
  const ulong high = x1 * y1 + (middle >> 32) + (carry >> 32), low = (carry << 32) | ((x0 * y0) & 0xffffffff);
  int exponent = b64_exponent(a) + b64_exponent(b) - 1023;
  ulong bits = (high << 15) | (low >> 49) | ((low << 15) != 0 ? 1ul : 0ul);  // of 104 or 105 bits the upper 56 or 57
  if ((bits >> 56) != 0) {
    bits = shift_sticky(bits, 1);
    exponent++;
  }
  return b64_rounded(sign, exponent, bits);
}

METAL_FUNC ulong b64_divide(ulong a, ulong b) {
  if (b64_is_nan(a) || b64_is_nan(b) || b64_is_zero(b)) return B64_NAN;
  const ulong sign = (a ^ b) & B64_SIGN;
  if (b64_is_zero(a)) return sign;
  int exponent = b64_exponent(a) - b64_exponent(b) + 1023;
  ulong rest = b64_fraction(a), bits = 0;
  const ulong divisor = b64_fraction(b);
  if (rest < divisor) {
    rest <<= 1;
    exponent--;
  }
  for (int i = 0; i < 56; i++) {
    bits <<= 1;
    if (rest >= divisor) {
      rest -= divisor;
      bits |= 1;
    }
    rest <<= 1;
  }
  return b64_rounded(sign, exponent, bits | (rest != 0 ? 1ul : 0ul));
}

/// a < b; false if one is NaN.
METAL_FUNC bool b64_less(ulong a, ulong b) {
  if (b64_is_nan(a) || b64_is_nan(b) || (b64_is_zero(a) && b64_is_zero(b))) return false;
  const bool a_negative = (a >> 63) != 0, b_negative = (b >> 63) != 0;
  if (a_negative != b_negative) return a_negative;
  return a_negative ? a > b : a < b;
}
METAL_FUNC bool b64_positive(ulong a) {
  return b64_less(0, a);
}

METAL_FUNC ulong b64_of_uint(ulong n) {
  if (n == 0) return 0;
  const int shift = leading_zeros(n);
  return b64_rounded(0, 1023 + 63 - shift, shift_sticky(n << shift, 8));
}

METAL_FUNC ulong b64_of(float x) {
  const uint bits = as_type<uint>(x), magnitude = bits & 0x7fffffffu;
  const ulong sign = ulong(bits >> 31) << 63;
  if (magnitude == 0) return sign;
  if (magnitude >= 0x7f800000u) return B64_NAN;
  if (magnitude < 0x800000u) {  // subnormal: magnitude * 2^-149
    const int shift = int(clz(magnitude));
    return sign | ((ulong(1023 - 149 + 31 - shift) << 52) + ((ulong(magnitude) << (shift + 21)) & 0xffffffffffffful));
  }
  return sign | ((ulong((magnitude >> 23) + 896) << 52) | (ulong(magnitude & 0x7fffffu) << 29));
}

/// The nearest float's bits; magnitudes above the largest float do not occur.
METAL_FUNC uint b64_float_bits(ulong a) {
  if (b64_is_nan(a)) return 0x7fc00000u;
  if (b64_is_zero(a)) return uint(a >> 63) << 31;
  const int exponent = b64_exponent(a) - 896;
  const int shift = exponent >= 1 ? 26 : min(27 - exponent, 60);  // leaves 24 bits, or those of a subnormal, and 3
  ulong bits = shift_sticky(b64_fraction(a), shift);
  const uint rest = uint(bits & 7);
  bits >>= 3;
  bits += (rest > 4 || (rest == 4 && (bits & 1) != 0)) ? 1 : 0;
  const uint magnitude = exponent >= 1 ? (uint(exponent) << 23) + (uint(bits) - 0x800000u) : uint(bits);
  return (uint(a >> 63) << 31) | magnitude;
}
