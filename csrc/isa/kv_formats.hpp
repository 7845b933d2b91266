// What keys and values are stored as and how they meet queries and weights: bf16, float32, or int8 with scales.
//
// Element is what the cache stores, Factor what queries and weights are rounded to, Sum what products are added in. A
// Sum of integers is exact, so positions that weigh nothing may take part in it.
#pragma once

namespace {

constexpr float kTiny = 1e-30f;  // vectors that are smaller count as 0

#if !defined(SPECFAST_BF16_DOT)
inline Pairs broadcast_pair(const uint16_t* two) {
  return {broadcast(from_bf16(two[0])), broadcast(from_bf16(two[1]))};
}
inline Pairs first_of_pairs(Pairs a) {
  return {a.first, zero()};
}
/// Stores kLanes floats as bf16 and returns what they became.
inline Vec store_bf16(uint16_t* p, Vec a) {
  store_bf16_part(p, a, kLanes);
  return load_bf16(p);
}
inline Vec dot_pairs(Vec acc, Pairs a, Pairs b) {
  return fma(a.second, b.second, fma(a.first, b.first, acc));
}
#endif

/// Keys and values in bf16, two of them to a dot: see KvPage.
struct Bf16Kv {
  using Element = uint16_t;
  using Factor = uint16_t;
  using Pair = Pairs;
  using Sum = Vec;
  static constexpr bool kExact = false;
  static constexpr int kBeside = 2;  // dimensions of a key, and positions of a value, that lie side by side

  /// Rounds a vector as it is stored; returns its scale.
  static float round(const float* from, Element* to, int n) {
    for (int d = 0; d < n; d += kLanes)
      store_bf16_part(to + d, load_part(from + d, smaller(kLanes, n - d)), smaller(kLanes, n - d));
    return 1.0f;
  }
  /// Rounds a query as it is multiplied; returns its scale.
  static float round_query(const float* from, Factor* to, int n) { return round(from, to, n); }
  /// Stores kLanes weights as they are multiplied, and returns those.
  static Vec weigh(Vec e, Factor* to) { return store_bf16(to, e); }
  static Pair both(const Factor* two) { return broadcast_pair(two); }
  /// Dimensions d and d + 1 of the kLanes positions from `lane` of a tile on.
  static Pair keys(const Element* tile, int d, int lane) { return load_pairs(tile + d * kKeyTile + 2 * lane); }
  /// kLanes dimensions from d on of an even position and the next; `width` dimensions lie side by side.
  static Pair values(const Element* v, int, int d) { return load_pairs(v + 2 * d); }
  static Pair first_values(const Element* v, int, int d) { return first_of_pairs(load_pairs(v + 2 * d)); }
  static Sum nothing() { return zero(); }
  static Vec dot(Vec acc, Pair a, Pair b) { return dot_pairs(acc, a, b); }
  /// Scores of kLanes positions; scales are those of the keys there.
  static Vec score(Sum acc, float scale, const float*, int) { return mul(acc, broadcast(scale)); }
  /// Where a sum of weighted values starts, and where it goes.
  static Sum resume(const float* acc) { return load(acc); }
  static void keep_sum(float* acc, Sum a, float) { store(acc, a); }
};

/// The same in float32.
struct F32Kv {
  using Element = float;
  using Factor = float;
  struct Pair {
    Vec first, second;
  };
  using Sum = Vec;
  static constexpr bool kExact = false;
  static constexpr int kBeside = 1;

  static float round(const float* from, Element* to, int n) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
    return 1.0f;
  }
  static float round_query(const float* from, Factor* to, int n) { return round(from, to, n); }
  static Vec weigh(Vec e, Factor* to) {
    store(to, e);
    return e;
  }
  static Pair both(const Factor* two) { return {broadcast(two[0]), broadcast(two[1])}; }
  static Pair keys(const Element* tile, int d, int lane) {
    const Element* at = tile + d * kKeyTile + lane;
    return {load(at), load(at + kKeyTile)};
  }
  static Pair values(const Element* v, int width, int d) { return {load(v + d), load(v + width + d)}; }
  static Pair first_values(const Element* v, int, int d) { return {load(v + d), zero()}; }
  static Sum nothing() { return zero(); }
  static Vec dot(Vec acc, Pair a, Pair b) { return fma(a.second, b.second, fma(a.first, b.first, acc)); }
  static Vec score(Sum acc, float scale, const float*, int) { return mul(acc, broadcast(scale)); }
  static Sum resume(const float* acc) { return load(acc); }
  static void keep_sum(float* acc, Sum a, float) { store(acc, a); }
};

/// Rounds n floats to integers of at most `top` in size and returns the scale: x ~= scale * q. It is NaN if one is no
/// number, and 0 for vectors too small to matter. Writes whole vectors.
inline float round_to_ints(const float* x, int n, float top, int16_t* q) {
  Vec peak = zero(), poison = zero();
  for (int i = 0; i < n; i += kLanes) {
    const int part = smaller(kLanes, n - i);
    const Vec a = keep(load_part(x + i, part), part, 0.0f);
    peak = max(peak, max(a, sub(zero(), a)));
    poison = fma(a, zero(), poison);
  }
  const float largest = maximum(peak);
  const Vec inverse = broadcast(largest > kTiny ? top / largest : 0.0f);
  for (int i = 0; i < n; i += kLanes) store_int16(q + i, mul(load_part(x + i, smaller(kLanes, n - i)), inverse));
  return (largest > kTiny ? largest / top : 0.0f) + sum(poison);
}

/// Keys and values in int8 with a scale for each vector; queries and weights in 16 bits, products added in 32.
struct Int8Kv {
  using Element = int8_t;
  using Factor = int16_t;
  using Pair = IntPairs;
  using Sum = Ints;
  static constexpr bool kExact = true;
  static constexpr int kBeside = 2;
  static constexpr float kQueryTop = 16383.0f;   // 127 times it and kMaxHeadDim fits 32 bits
  static constexpr float kWeightTop = 32767.0f;  // 127 times it and kPagePositions does too

  static float round(const float* from, Element* to, int n) {
    alignas(64) int16_t wide[kMaxHeadDim];
    const float scale = round_to_ints(from, n, 127.0f, wide);
    for (int d = 0; d < n; d++) to[d] = static_cast<int8_t>(wide[d]);
    return scale;
  }
  static float round_query(const float* from, Factor* to, int n) { return round_to_ints(from, n, kQueryTop, to); }
  static Pair both(const Factor* two) { return broadcast_int_pair(two); }
  static Pair keys(const Element* tile, int d, int lane) { return load_int8_pairs(tile + d * kKeyTile + 2 * lane); }
  static Pair values(const Element* v, int, int d) { return load_int8_pairs(v + 2 * d); }
  static Sum nothing() { return no_ints(); }
  static Sum dot(Sum acc, Pair a, Pair b) { return dot_int_pairs(acc, a, b); }
  static Vec score(Sum acc, float scale, const float* scales, int position) {
    return mul(to_floats(acc), mul(broadcast(scale), load(scales + position)));
  }
  static Sum resume(const float*) { return no_ints(); }
  static void keep_sum(float* acc, Sum a, float step) { store(acc, fma(to_floats(a), broadcast(step), load(acc))); }
};

/// Rounds n floats to MLX's affine codes: x ~= scale * code + bias, as mlx.core.quantize does. Of the smallest and the
/// largest value, the one further from 0 is exact, and 0 is a multiple of the scale away from it.
inline void round_to_codes(const float* x, int n, int bits, bool bf16_scales, uint8_t* codes, float* scale,
                           float* bias) {
  const float most = static_cast<float>((1 << bits) - 1);
  float least = x[0], largest = x[0], poison = 0;
  for (int i = 0; i < n; i++) {
    least = x[i] < least ? x[i] : least;
    largest = x[i] > largest ? x[i] : largest;
    poison += x[i] * 0.0f;
  }
  float step = (largest - least) / most;
  step = step > 1e-7f ? step : 1e-7f;
  float edge = least;
  if (!(-least > largest)) {
    edge = largest;
    step = -step;
  }
  const float steps = __builtin_rintf(edge / step);
  if (steps != 0.0f) step = edge / steps;
  const float zero_point = steps != 0.0f ? edge : 0.0f;
  for (int i = 0; i < n; i++) {
    const float code = __builtin_rintf((x[i] - zero_point) / step);
    codes[i] = static_cast<uint8_t>(code > 0.0f ? (code < most ? code : most) : 0.0f);
  }
  const auto kept = [&](float a) {
    if (!bf16_scales) return a;
    uint16_t half;
    store_bf16_part(&half, broadcast(a), 1);
    return from_bf16(half);
  };
  *scale = kept(step) + poison;
  *bias = kept(zero_point);
}

/// Appends a vector of keys and one of values to a page of affine codes.
inline void append_codes(const KvPage& page, const float* k, const float* v, int head_dim, int position) {
  const int groups = head_dim / page.group, biases = groups * kPagePositions;
  alignas(64) uint8_t keys[kMaxHeadDim], values[kMaxHeadDim];
  for (int g = 0; g < groups; g++) {
    const int first = g * page.group;
    float* k_scale = page.k_scales + g * kPagePositions + position;
    float* v_scale = page.v_scales + position * groups + g;
    round_to_codes(k + first, page.group, page.bits, page.bf16_scales, keys + first, k_scale, k_scale + biases);
    round_to_codes(v + first, page.group, page.bits, page.bf16_scales, values + first, v_scale, v_scale + biases);
  }
  const auto put = [&](KvPage::Place place, uint8_t code) {
    if (page.bits == 4) code = static_cast<uint8_t>((*place.byte & ~(15 << place.shift)) | code << place.shift);
    *place.byte = code;
  };
  for (int d = 0; d < head_dim; d++) {
    put(page.key_code(head_dim, position, d), keys[d]);
    put(page.value_code(head_dim, position, d), values[d]);
  }
}

/// A page of affine codes as a page of float32 in `wide`, positions [begin, end).
inline KvPage widen_codes(const KvPage& page, int begin, int end, int head_dim, float* wide) {
  const int groups = head_dim / page.group, biases = groups * kPagePositions;
  const auto* codes = static_cast<const uint8_t*>(page.k);
  for (int tile = begin / kKeyTile * kKeyTile; tile < end; tile += kKeyTile) {
    for (int d = 0; d < head_dim; d++) {
      const float* scales = page.k_scales + d / page.group * kPagePositions + tile;
      float* out = wide + tile * head_dim + d * kKeyTile;
      if (page.bits == 8) {
        const uint8_t* from = codes + tile * head_dim + d * kKeyTile;
        for (int i = 0; i < kKeyTile; i++) out[i] = static_cast<float>(from[i]) * scales[i] + scales[i + biases];
      } else {
        const uint8_t* from = codes + (tile * head_dim + d / 2 * 2 * kKeyTile) / 2;
        const int shift = d % 2 * 4;
        for (int i = 0; i < kKeyTile; i++)
          out[i] = static_cast<float>((from[i] >> shift) & 15) * scales[i] + scales[i + biases];
      }
    }
  }
  codes = static_cast<const uint8_t*>(page.v);
  float* v = wide + kPagePositions * head_dim;
  for (int first = 0; first < head_dim; first += kValueSlice) {
    const int width = smaller(kValueSlice, head_dim - first), half = width / 2;
    for (int i = begin; i < end; i++) {
      const float* scales = page.v_scales + i * groups;
      float* out = v + i * width;
      for (int part = 0; part < 2; part++) {
        const int group = (first + part * half) / page.group;
        const float scale = scales[group], bias = scales[group + biases];
        if (page.bits == 8) {
          const uint8_t* from = codes + i * width + part * half;
          for (int d = 0; d < half; d++) out[part * half + d] = static_cast<float>(from[d]) * scale + bias;
        } else {
          const uint8_t* from = codes + i * half;
          for (int d = 0; d < half; d++)
            out[part * half + d] = static_cast<float>((from[d] >> (part * 4)) & 15) * scale + bias;
        }
      }
    }
    codes += width * kPagePositions * page.bits / 8;
    v += width * kPagePositions;
  }
  return {wide, wide + kPagePositions * head_dim, nullptr, nullptr, KvFormat::f32};
}

}  // namespace
