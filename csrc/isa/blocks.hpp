// GGUF's quantised blocks, unpacked as they are read: a panel of rows into the affine layout, a row into floats.
#pragma once

namespace {

inline float half_at(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return from_f16(bits);
}

/// 16 bytes, low nibbles of a run of inputs and high nibbles of another, to two runs of 8 bytes in MLX's order.
inline void split_nibbles(const uint8_t* packed, uint8_t* low, uint8_t* high) {
  typedef uint16_t Pairs __attribute__((vector_size(16)));
  typedef uint8_t Half __attribute__((vector_size(8)));
  Pairs pairs;
  std::memcpy(&pairs, packed, 16);
  const Pairs lows = (pairs & 15) | ((pairs >> 4) & 0xf0), highs = ((pairs >> 4) & 15) | ((pairs >> 8) & 0xf0);
  const Half first = __builtin_convertvector(lows, Half), second = __builtin_convertvector(highs, Half);
  std::memcpy(low, &first, 8);
  std::memcpy(high, &second, 8);
}

/// The 6-bit factors of Q4_K and Q5_K: of the scale and of the minimum of each of 8 groups.
inline void k_factors(const uint8_t* packed, uint8_t* scale, uint8_t* least) {
  for (int i = 0; i < 4; i++) {
    const uint8_t first = packed[i], second = packed[4 + i], third = packed[8 + i];
    scale[i] = first & 63;
    least[i] = second & 63;
    scale[4 + i] = static_cast<uint8_t>((third & 15) | (first >> 6 << 4));
    least[4 + i] = static_cast<uint8_t>((third >> 4) | (second >> 6 << 4));
  }
}

/// One block as words of the affine layout at q, and group g's scale and bias at s[g * stride] and b[g * stride].
template <BlockType B>
inline void unpack_block(const uint8_t* block, uint8_t* q, float* s, float* b, size_t stride) {
  if constexpr (B == BlockType::q4_0) {  // f16 d; 16 bytes of nibbles. w = d (q - 8)
    const float d = half_at(block);
    split_nibbles(block + 2, q, q + 8);
    *s = d;
    *b = -8 * d;
  } else if constexpr (B == BlockType::q4_1) {  // f16 d, f16 m; 16 bytes of nibbles. w = d q + m
    split_nibbles(block + 4, q, q + 8);
    *s = half_at(block);
    *b = half_at(block + 2);
  } else if constexpr (B == BlockType::q8_0) {  // f16 d; 32 int8. w = d q, with q + 128 as an unsigned byte
    const float d = half_at(block);
    typedef uint8_t Bytes __attribute__((vector_size(32)));
    Bytes bytes;
    std::memcpy(&bytes, block + 2, 32);
    bytes ^= 128;
    std::memcpy(q, &bytes, 32);
    *s = d;
    *b = -128 * d;
  } else {  // f16 d, f16 dmin; 12 bytes of factors; in Q5_K 32 bytes of fifth bits; nibbles. w = d s q - dmin m
    uint8_t scale[8], least[8];
    k_factors(block + 4, scale, least);
    const float d = half_at(block), dmin = half_at(block + 2);
    for (size_t g = 0; g < 8; g++) {
      s[g * stride] = d * scale[g];
      b[g * stride] = -dmin * least[g];
    }
    for (int pair = 0; pair < 4; pair++) {  // groups 2 pair and 2 pair + 1
      if constexpr (B == BlockType::q4_k) {
        for (int i = 0; i < 2; i++)
          split_nibbles(block + 16 + 32 * pair + 16 * i, q + 32 * pair + 8 * i, q + 32 * pair + 16 + 8 * i);
      } else {
        const uint8_t *fifth = block + 16, *nibbles = block + 48 + 32 * pair;
        for (int i = 0; i < 32; i++) {
          q[64 * pair + i] = static_cast<uint8_t>((nibbles[i] & 15) | ((fifth[i] >> (2 * pair) & 1) << 4));
          q[64 * pair + 32 + i] = static_cast<uint8_t>((nibbles[i] >> 4) | ((fifth[i] >> (2 * pair + 1) & 1) << 4));
        }
      }
    }
  }
}

/// A block of Q6_K, 128 bytes of low nibbles, 64 of upper bit pairs, 16 int8 scales and f16 d, as 256 floats:
/// w = d s (q - 32).
inline void unpack_q6_k(const uint8_t* block, float* out) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  typedef uint16_t Pairs __attribute__((vector_size(16)));
  typedef float Floats __attribute__((vector_size(64)));
  const float d = half_at(block + 208);
  float scales[16];
  for (int i = 0; i < 16; i++) scales[i] = d * static_cast<float>(static_cast<int8_t>(block[192 + i]));
  for (int part = 0; part < 8; part++) {  // 32 inputs; four parts share 64 bytes of nibbles and 32 of pairs
    const uint8_t* low = block + part / 4 * 64 + part % 2 * 32;
    const uint8_t* high = block + 128 + part / 4 * 32;
    const int nibble = part % 4 / 2 * 4, pair = part % 4 * 2;
    for (int half = 0; half < 2; half++) {
      Pairs l, h;  // of bytes: what a shift brings in from the neighbour is masked
      std::memcpy(&l, low + 16 * half, 16);
      std::memcpy(&h, high + 16 * half, 16);
      const Bytes q = reinterpret_cast<Bytes>(((l >> nibble) & 0x0f0f) | (((h >> pair) & 0x0303) << 4));
      const Floats values = scales[2 * part + half] * (__builtin_convertvector(q, Floats) - 32.0f);
      std::memcpy(out + 32 * part + 16 * half, &values, sizeof values);
    }
  }
}

template <BlockType B>
void unpack_rows(const Matrix& w, int n, uint8_t* out, float* scales, float* biases) {
  constexpr size_t inputs = block_size(B).inputs, bytes = block_size(B).bytes, groups = inputs / 32;
  constexpr size_t unpacked = inputs / (unpacked_format(B) == Format::q4 ? 2 : 1);
  const size_t blocks = static_cast<size_t>(w.K) / inputs;
  for (int r = 0; r < kPanel; r++) {
    const uint8_t* row =
        static_cast<const uint8_t*>(w.weight) + static_cast<size_t>(smaller(n + r, w.N - 1)) * w.stored_row_bytes();
    uint8_t* to = out + static_cast<size_t>(r) * w.row_bytes();
    for (size_t i = 0; i < blocks; i++) {
      __builtin_prefetch(row + i * bytes + 2048);
      const size_t at = i * groups * kPanel + static_cast<size_t>(r);
      unpack_block<B>(row + i * bytes, to + i * unpacked, scales + at, biases + at, kPanel);
    }
  }
}

/// Unpacks the 16 rows from n on: returns them as rows 0 to 15 of a matrix at `out`, with their scales and biases
/// (groups, 16) transposed.
Matrix unpack_panel(const Matrix& w, int n, uint8_t* out, float* scales, float* biases) {
  Matrix rows = w;
  rows.blocks = BlockType::none;
  rows.N = kPanel;
  rows.weight = rows.scales = rows.biases = out;
  switch (w.blocks) {
    case BlockType::q4_0: unpack_rows<BlockType::q4_0>(w, n, out, scales, biases); break;
    case BlockType::q4_1: unpack_rows<BlockType::q4_1>(w, n, out, scales, biases); break;
    case BlockType::q8_0: unpack_rows<BlockType::q8_0>(w, n, out, scales, biases); break;
    case BlockType::q4_k: unpack_rows<BlockType::q4_k>(w, n, out, scales, biases); break;
    case BlockType::q5_k: unpack_rows<BlockType::q5_k>(w, n, out, scales, biases); break;
    default:
      for (int r = 0; r < kPanel; r++)
        unpack_floats(w, smaller(n + r, w.N - 1), reinterpret_cast<float*>(out) + static_cast<size_t>(r) * w.K);
  }
  return rows;
}

template <BlockType B>
void unpack_affine(const Matrix& w, const uint8_t* row, float* out) {
  constexpr BlockSize size = block_size(B);
  for (size_t i = 0; i < static_cast<size_t>(w.K) / size.inputs; i++) {
    uint8_t q[size.inputs];
    float s[size.inputs / 32], b[size.inputs / 32];
    unpack_block<B>(row + i * size.bytes, q, s, b, 1);
    for (int k = 0; k < static_cast<int>(size.inputs); k += kLanes) {
      const Vec value = unpacked_format(B) == Format::q4 ? load_q4(q, k) : load_q8(q, k);
      store(out + i * size.inputs + k, fma(broadcast(s[k / 32]), value, broadcast(b[k / 32])));
    }
  }
}

/// Row `row` of a matrix of blocks as floats (K,).
void unpack_floats(const Matrix& w, int row, float* out) {
  const uint8_t* data = static_cast<const uint8_t*>(w.weight) + static_cast<size_t>(row) * w.stored_row_bytes();
  switch (w.blocks) {
    case BlockType::q4_0: return unpack_affine<BlockType::q4_0>(w, data, out);
    case BlockType::q4_1: return unpack_affine<BlockType::q4_1>(w, data, out);
    case BlockType::q8_0: return unpack_affine<BlockType::q8_0>(w, data, out);
    case BlockType::q4_k: return unpack_affine<BlockType::q4_k>(w, data, out);
    case BlockType::q5_k: return unpack_affine<BlockType::q5_k>(w, data, out);
    default:
      for (int i = 0; i < w.K / 256; i++) unpack_q6_k(data + static_cast<size_t>(i) * 210, out + 256 * i);
  }
}

}  // namespace
