// Row-wise kernels written once over the vector primitives: norms, roundings, RoPE, cache stores, running maximum.
#pragma once

#if defined(__clang__)
#define SPECFAST_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SPECFAST_UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

using namespace specfast;  // NOLINT: this header is only ever part of one instruction set's unit

inline int smaller(int a, int b) {
  return a < b ? a : b;
}
inline int larger(int a, int b) {
  return a > b ? a : b;
}

/// Repeats an instruction on 12 chains of its own, `iterations` times each; returns how often it ran.
template <class Acc, class Step>
inline uint64_t run_chains(Acc start, uint64_t iterations, const Step& step) {
  constexpr int kChains = 12;
  Acc acc[kChains];
  SPECFAST_UNROLL
  for (int i = 0; i < kChains; i++) acc[i] = start;
  for (uint64_t n = 0; n < iterations; n++) {
    SPECFAST_UNROLL
    for (int i = 0; i < kChains; i++) step(acc[i]);
  }
  return iterations * kChains;
}

/// exp(x) to about 1 ulp; clamps x to +-87 and lets NaN through.
inline Vec exp(Vec x) {
  x = min(broadcast(87.0f), max(broadcast(-87.0f), x));
  const Vec n = round_even(mul(x, broadcast(1.44269504f)));
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), broadcast(1.0f));
  return mul(p, pow2(n));
}

inline Vec silu(Vec x) {
  return div(x, add(broadcast(1.0f), exp(sub(zero(), x))));
}

float sum_squares(const float* x, int n) {
  Vec total[4] = {zero(), zero(), zero(), zero()};
  int i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    SPECFAST_UNROLL
    for (int j = 0; j < 4; j++) {
      const Vec a = load(x + i + j * kLanes);
      total[j] = fma(a, a, total[j]);
    }
  }
  for (; i < n; i += kLanes) {
    const Vec a = load_part(x + i, smaller(kLanes, n - i));
    total[0] = fma(a, a, total[0]);
  }
  return sum(add(add(total[0], total[1]), add(total[2], total[3])));
}

void scale_row(const float* x, const float* weight, float inv, float* out, int n) {
  const Vec scale = broadcast(inv);
  for (int i = 0; i < n; i += kLanes) {
    const int part = smaller(kLanes, n - i);
    store_part(out + i, mul(mul(load_part(x + i, part), scale), load_part(weight + i, part)), part);
  }
}

void round_bf16(const Rows& rows, int k0, int k1) {
  for (int m = 0; m < rows.M; m++) {
    const float* x = rows.f32 + static_cast<size_t>(m) * rows.stride;
    uint16_t* out = rows.bf16 + static_cast<size_t>(m) * rows.stride;
    for (int k = k0; k < k1; k += kLanes) {
      const int part = smaller(kLanes, k1 - k);
      store_bf16_part(out + k, load_part(x + k, part), part);
    }
  }
}

/// What quantising one block found: its largest magnitude, whether one input is no number, and the sum of its integers.
struct QuantisedBlock {
  float top;
  bool nan;
  int32_t sum;
};

/// Quantises all blocks of columns [k0, k1): quantise_block(x, q) fills q and returns a QuantisedBlock.
template <class Quantise>
inline void quantise_blocks(const Rows& rows, Int8Layout layout, int k0, int k1, const Quantise& quantise_block) {
  const int block = block_of(layout);
  const Int8Rows& out = rows.int8[layout];
  for (int m = 0; m < rows.M; m++) {
    for (int k = k0; k < k1; k += block) {
      const size_t at = static_cast<size_t>(k / block) * rows.M + m;
      const QuantisedBlock found =
          quantise_block(rows.f32 + static_cast<size_t>(m) * rows.stride + k, out.q + at * block);
      out.scale[at] = found.nan ? __builtin_nanf("") : found.top * (1.0f / 127.0f);
      out.scaled_sum[at] = out.scale[at] * static_cast<float>(found.sum);
      out.sum[at] = found.sum;
    }
  }
}

void rope_head(float* x, const float* cos, const float* sin, int head_dim) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; i += kLanes) {
    const int part = smaller(kLanes, half - i);
    const Vec a = load_part(x + i, part), b = load_part(x + half + i, part);
    const Vec c = load_part(cos + i, part), s = load_part(sin + i, part);
    store_part(x + i, sub(mul(a, c), mul(b, s)), part);
    store_part(x + half + i, add(mul(b, c), mul(a, s)), part);
  }
}

void logits_rows(const float* logits, int n, int first, RowMax* best) {
  Vec top = load_part(logits, smaller(kLanes, n));
  top = keep(top, n, logits[0]);
  Vec poison = zero();
  for (int i = 0; i < n; i += kLanes) {
    const int part = smaller(kLanes, n - i);
    const Vec a = keep(load_part(logits + i, part), part, logits[0]);
    poison = add(poison, sub(a, a));  // 0 unless a lane is infinite or NaN
    top = max(top, a);
  }
  best->poison += sum(poison);
  const float value = maximum(top);
  if (best->index >= 0 && !(value > best->value)) return;
  for (int i = 0; i < n; i++) {
    if (logits[i] == value) {
      best->value = value;
      best->index = first + i;
      return;
    }
  }
}

inline float scale_at(const void* scales, Format format, size_t i) {
  switch (format) {
    case Format::bf16: return from_bf16(static_cast<const uint16_t*>(scales)[i]);
    case Format::f16: return from_f16(static_cast<const uint16_t*>(scales)[i]);
    default: return static_cast<const float*>(scales)[i];
  }
}

void unpack_floats(const Matrix& w, int row, float* out);

void embed_row(const Matrix& w, int row, float* out) {
  if (w.blocks != BlockType::none) return unpack_floats(w, row, out);
  const uint8_t* data = static_cast<const uint8_t*>(w.weight) + static_cast<size_t>(row) * w.row_bytes();
  if (is_quantised(w.format)) {
    const size_t groups = w.groups();
    for (size_t g = 0; g < groups; g++) {
      const Vec s = broadcast(scale_at(w.scales, w.scale_format, static_cast<size_t>(row) * groups + g));
      const Vec b = broadcast(scale_at(w.biases, w.scale_format, static_cast<size_t>(row) * groups + g));
      for (int i = 0; i < w.group; i += kLanes) {
        const int k = static_cast<int>(g) * w.group + i;
        store(out + k, fma(s, w.format == Format::q4 ? load_q4(data, k) : load_q8(data, k), b));
      }
    }
    return;
  }
  for (int k = 0; k < w.K; k += kLanes) {
    const int part = smaller(kLanes, w.K - k);
    switch (w.format) {
      case Format::bf16:
        store_part(out + k, load_bf16_part(reinterpret_cast<const uint16_t*>(data) + k, part), part);
        break;
      case Format::f16:
        store_part(out + k, load_f16_part(reinterpret_cast<const uint16_t*>(data) + k, part), part);
        break;
      default: store_part(out + k, load_part(reinterpret_cast<const float*>(data) + k, part), part); break;
    }
  }
}

}  // namespace
