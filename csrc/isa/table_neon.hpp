// What the NEON tables share: everything but the int8 panel.
#pragma once

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
  if (activation == Activation::int8) {
    const int8x16_t a = vdupq_n_s8(1);
    return kDotProducts * run_chains(vdupq_n_s32(0), iterations, [a](int32x4_t& acc) { dot_once(acc, a); });
  }
  const Vec a = broadcast(0.5f);
  return 4 * run_chains(zero(), iterations, [a](Vec& acc) {
           __asm__ volatile("fmla %0.4s, %1.4s, %1.4s" : "+w"(acc) : "w"(a));
         });
}

const KernelInfo kInfos[] = {
    {"matmul_rows", "matmul_rows_q4_int8_10x8_" SPECFAST_NEON},
    {"matmul_rows", "matmul_rows_q8_int8_10x8_" SPECFAST_NEON},
    {"matmul_rows", "matmul_rows_any_f32_4x4_" SPECFAST_NEON},
    {"matmul_rows", "matmul_rows_any_bf16_4x4_" SPECFAST_NEON},
    {"swiglu_rows", "swiglu_rows_any_any_16x16_" SPECFAST_NEON},
    {"qkv_rope_append", "qkv_rope_append_f32_f32_1x4_" SPECFAST_NEON},
    {"attend_rows", "attend_rows_bf16_f32_4x16_" SPECFAST_NEON},
    {"attend_rows", "attend_rows_int8_int16_4x16_" SPECFAST_NEON},
    {"logits_rows", "logits_rows_f32_f32_1x4_" SPECFAST_NEON},
    {"embed_rows", "embed_rows_any_f32_1x4_" SPECFAST_NEON},
};

KernelTable neon_table(const char* features, void (*quantise)(const Rows&, Int8Layout, int, int)) {
  return {SPECFAST_NEON, features,    kInfos,      sizeof(kInfos) / sizeof(kInfos[0]),
          sum_squares,   scale_row,   round_bf16,  quantise,
          matmul_rows,   nullptr,     swiglu_rows, rope_head,
          append_head,   attend_rows, merge_spans, logits_rows,
          kLawLoops,     embed_row,   read_bytes,  peak_dot};
}

}  // namespace
