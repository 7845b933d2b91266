// The NEON kernel table (Armv8.2 with dot products).
#include "../kernels.hpp"
#include "simd_neon.hpp"
// clang-format off: each header uses what the ones before it define
#include "elementwise.hpp"
#include "law_loops.hpp"
#include "attend.hpp"
#include "matmul_loads.hpp"
#include "int8_portable.hpp"
#include "int8_neon.hpp"
#include "matmul.hpp"
// clang-format on

namespace {

uint32_t read_bytes(const void* data, size_t bytes) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
  uint8x16_t seen[4] = {vdupq_n_u8(0), vdupq_n_u8(0), vdupq_n_u8(0), vdupq_n_u8(0)};
  for (size_t at = 0; at + 64 <= bytes; at += 64) {
    SPECFAST_UNROLL
    for (int i = 0; i < 4; i++) seen[i] = vorrq_u8(seen[i], vld1q_u8(p + at + 16 * i));
  }
  const uint8x16_t all = vorrq_u8(vorrq_u8(seen[0], seen[1]), vorrq_u8(seen[2], seen[3]));
  return vaddvq_u32(vreinterpretq_u32_u8(all));
}

uint64_t peak_dot(Activation activation, uint64_t iterations) {
  constexpr int kChains = 12;
  if (activation == Activation::int8) {
    int32x4_t acc[kChains];
    const int8x16_t a = vdupq_n_s8(1);
    SPECFAST_UNROLL
    for (int i = 0; i < kChains; i++) acc[i] = vdupq_n_s32(0);
    for (uint64_t n = 0; n < iterations; n++) {
      SPECFAST_UNROLL
      for (int i = 0; i < kChains; i++) __asm__ volatile("sdot %0.4s, %1.16b, %1.16b" : "+w"(acc[i]) : "w"(a));
    }
    return iterations * kChains * 16;
  }
  Vec acc[kChains];
  const Vec a = broadcast(0.5f);
  SPECFAST_UNROLL
  for (int i = 0; i < kChains; i++) acc[i] = zero();
  for (uint64_t n = 0; n < iterations; n++) {
    SPECFAST_UNROLL
    for (int i = 0; i < kChains; i++) __asm__ volatile("fmla %0.4s, %1.4s, %1.4s" : "+w"(acc[i]) : "w"(a));
  }
  return iterations * kChains * 4;
}

const KernelInfo kInfos[] = {
    {"matmul_rows", "matmul_rows_q4_int8_4x8_neon"},   {"matmul_rows", "matmul_rows_q8_int8_4x8_neon"},
    {"matmul_rows", "matmul_rows_any_f32_4x4_neon"},   {"matmul_rows", "matmul_rows_any_bf16_4x4_neon"},
    {"swiglu_rows", "swiglu_rows_any_any_16x16_neon"}, {"qkv_rope_append", "qkv_rope_append_f32_f32_1x4_neon"},
    {"attend_rows", "attend_rows_bf16_f32_4x16_neon"}, {"logits_rows", "logits_rows_f32_f32_1x4_neon"},
    {"embed_rows", "embed_rows_any_f32_1x4_neon"},
};

}  // namespace

namespace specfast {

const KernelTable& neon_kernels() {
  static const KernelTable table{"neon",      "Armv8.2 dot products (asimddp)",
                                 kInfos,      sizeof(kInfos) / sizeof(kInfos[0]),
                                 sum_squares, scale_row,
                                 round_bf16,  quantise_int8,
                                 matmul_rows, nullptr,
                                 swiglu_rows, rope_head,
                                 append_head, attend_rows,
                                 merge_spans, logits_rows,
                                 kLawLoops,   embed_row,
                                 read_bytes,  peak_dot};
  return table;
}

}  // namespace specfast
