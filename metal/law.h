// Weights and masses of laws in the order of csrc/law_loops.hpp and csrc/row_law.hpp.
#pragma once
#include "random.h"

constant constexpr int CHUNK = 256;       // ids that are summed together, in 16 sums
constant constexpr int MOST_BLOCKS = 512;

/// Chunks of a block, whose masses are added before those of the blocks are.
METAL_FUNC int chunks_of_block(int V) {
  return V / MOST_BLOCKS / CHUNK + 1;
}

/// exp(x) for x <= 0 within 2 ulp; 0 below -87.3.
METAL_FUNC float exp_of_negative(float x) {
  const int limit = as_type<int>(87.3f);
  const int magnitude = min(as_type<int>(x) & 0x7fffffff, limit);
  const float clamped = -as_type<float>(magnitude), round = 12582912.0f;
  const float scaled = clamped * 1.44269504f;
  const float shifted = scaled + round;
  const float n = shifted - round;
  const float high = n * 0.693359375f, low = n * -2.12194440e-4f;
  const float r = (clamped - high) - low;
  const float coefficients[6] = {1.0f / 5040.0f, 1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f};
  float tail = coefficients[0];
  for (int c = 1; c < 6; c++) {
    const float product = tail * r;
    tail = product + coefficients[c];
  }
  const float square = tail * r * r;
  const float fraction = square + r + 1.0f;
  const int exponent = as_type<int>(shifted) - as_type<int>(round);
  return as_type<float>((as_type<int>(fraction) + exponent * (1 << 23)) & ((magnitude - limit) >> 31));
}

METAL_FUNC ulong simd_down(ulong a, ushort step) {
  const uint low = simd_shuffle_down(uint(a), step), high = simd_shuffle_down(uint(a >> 32), step);
  return (ulong(high) << 32) | low;
}

/// The sum of a chunk in lane 0 of its 16 lanes, from their sums.
METAL_FUNC ulong sum_of_chunk(ulong mass) {
  for (ushort step = 8; step > 0; step /= 2) mass = b64_add(mass, simd_down(mass, step));
  return mass;
}

/// The mass of block `block`.
METAL_FUNC ulong mass_of_block(device const ulong* masses, int V, int block) {
  const int chunks = (V + CHUNK - 1) / CHUNK, each = chunks_of_block(V);
  ulong mass = 0;
  for (int c = block * each; c < min((block + 1) * each, chunks); c++) mass = b64_add(mass, masses[c]);
  return mass;
}

METAL_FUNC int blocks_of(int V) {
  const int size = chunks_of_block(V) * CHUNK;
  return (V + size - 1) / size;
}

/// The mass of all V ids, by the masses of their chunks.
METAL_FUNC ulong total_of(device const ulong* masses, int V) {
  ulong total = 0;
  for (int b = 0; b < blocks_of(V); b++) total = b64_add(total, mass_of_block(masses, V, b));
  return total;
}
