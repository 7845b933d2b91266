// The scalar kernel table: always built, and the oracle of the others.
#include "../kernels.hpp"
#include "simd_scalar.hpp"
// clang-format off: each header uses what the ones before it define
#include "elementwise.hpp"
#include "blocks.hpp"
#include "law_loops.hpp"
#include "kv_formats.hpp"
#include "attend.hpp"
#include "matmul_loads.hpp"
#include "int8_portable.hpp"
#include "int8_scalar.hpp"
#include "matmul.hpp"
// clang-format on

namespace {

uint32_t read_bytes(const void* data, size_t bytes) {
  const uint64_t* p = static_cast<const uint64_t*>(data);
  uint64_t seen[4] = {0, 0, 0, 0};
  for (size_t i = 0; i + 4 <= bytes / 8; i += 4) {
    for (size_t j = 0; j < 4; j++) seen[j] |= p[i + j];
  }
  const uint64_t all = seen[0] | seen[1] | seen[2] | seen[3];
  return static_cast<uint32_t>(all | (all >> 32));
}

uint64_t peak_dot(Activation, uint64_t iterations) {
  float acc[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (uint64_t i = 0; i < iterations; i++) {
    for (float& a : acc) {
      a = a * 0.5f + 1.0f;
      __asm__ volatile("" : "+m"(a));
    }
  }
  return iterations * 8;
}

const KernelInfo kInfos[] = {
    {"matmul_rows", "matmul_rows_q4_int8_16x16_scalar"}, {"matmul_rows", "matmul_rows_q8_int8_16x16_scalar"},
    {"matmul_rows", "matmul_rows_any_f32_4x4_scalar"},   {"matmul_rows", "matmul_rows_any_bf16_4x4_scalar"},
    {"swiglu_rows", "swiglu_rows_any_any_16x16_scalar"}, {"qkv_rope_append", "qkv_rope_append_f32_f32_1x1_scalar"},
    {"attend_rows", "attend_rows_bf16_f32_4x16_scalar"}, {"attend_rows", "attend_rows_int8_int16_4x16_scalar"},
    {"logits_rows", "logits_rows_f32_f32_1x1_scalar"},   {"embed_rows", "embed_rows_any_f32_1x1_scalar"},
};

}  // namespace

namespace specfast {

const KernelTable& scalar_kernels() {
  static const KernelTable table{"scalar",    "nothing special", kInfos,      sizeof(kInfos) / sizeof(kInfos[0]),
                                 sum_squares, scale_row,         round_bf16,  quantise_int8,
                                 matmul_rows, nullptr,           swiglu_rows, rope_head,
                                 append_head, attend_rows,       merge_spans, logits_rows,
                                 kLawLoops,   embed_row,         read_bytes,  peak_dot};
  return table;
}

}  // namespace specfast
