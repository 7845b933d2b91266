// The AVX-512 kernel table (F, BW, VL, DQ, VNNI, BF16).
#include "../kernels.hpp"
#include "simd_avx512.hpp"
// clang-format off: each header uses what the ones before it define
#include "elementwise.hpp"
#include "blocks.hpp"
#include "law_loops.hpp"
#include "kv_formats.hpp"
#include "attend.hpp"
#include "matmul_loads.hpp"
#include "int8_avx512.hpp"
#include "int8_packed_avx512.hpp"
#include "bf16_avx512.hpp"
#include "matmul.hpp"
// clang-format on

namespace {

uint32_t read_bytes(const void* data, size_t bytes) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
  __m512i seen[8];
  SPECFAST_UNROLL
  for (int i = 0; i < 8; i++) seen[i] = _mm512_setzero_si512();
  size_t at = 0;
  for (; at + 512 <= bytes; at += 512) {
    SPECFAST_UNROLL
    for (int i = 0; i < 8; i++) seen[i] = _mm512_or_si512(seen[i], _mm512_loadu_si512(p + at + 64 * i));
  }
  for (; at + 64 <= bytes; at += 64) seen[0] = _mm512_or_si512(seen[0], _mm512_loadu_si512(p + at));
  for (int i = 1; i < 8; i++) seen[0] = _mm512_or_si512(seen[0], seen[i]);
  return static_cast<uint32_t>(_mm512_reduce_or_epi32(seen[0]));
}

void pack_panel(const Matrix& w, int n, uint8_t* out) {
  return is_quantised(w.format) ? pack_quantised(w, n, out) : pack_bf16(w, n, out);
}

uint64_t peak_dot(Activation activation, uint64_t iterations) {
  if (activation == Activation::int8) {
    const __m512i a = _mm512_set1_epi8(1);
    return 64 * run_chains(_mm512_setzero_si512(), iterations, [a](__m512i& acc) {
             __asm__ volatile("vpdpbusd %1, %1, %0" : "+v"(acc) : "v"(a));
           });
  }
  const Vec a = broadcast(0.5f);
  if (activation == Activation::bf16)
    return 32 * run_chains(zero(), iterations, [a](Vec& acc) {
             __asm__ volatile("vdpbf16ps %1, %1, %0" : "+v"(acc) : "v"(a));
           });
  return 16 * run_chains(zero(), iterations, [a](Vec& acc) {
           __asm__ volatile("vfmadd231ps %1, %1, %0" : "+v"(acc) : "v"(a));
         });
}

const KernelInfo kInfos[] = {
    {"matmul_rows", "matmul_rows_q4_int8_12x32_avx512"},  {"matmul_rows", "matmul_rows_q8_int8_12x32_avx512"},
    {"matmul_rows", "matmul_rows_any_f32_4x4_avx512"},    {"matmul_rows", "matmul_rows_bf16_bf16_7x32_avx512"},
    {"swiglu_rows", "swiglu_rows_any_any_16x16_avx512"},  {"qkv_rope_append", "qkv_rope_append_f32_f32_1x16_avx512"},
    {"attend_rows", "attend_rows_bf16_bf16_4x64_avx512"}, {"attend_rows", "attend_rows_int8_int16_4x64_avx512"},
    {"logits_rows", "logits_rows_f32_f32_1x16_avx512"},   {"embed_rows", "embed_rows_any_f32_1x16_avx512"},
};

}  // namespace

namespace specfast {

const KernelTable& avx512_kernels() {
  static const KernelTable table{"avx512",    "AVX-512 F, BW, VL, DQ, VNNI and BF16",
                                 kInfos,      sizeof(kInfos) / sizeof(kInfos[0]),
                                 sum_squares, scale_row,
                                 round_bf16,  quantise_int8,
                                 matmul_rows, pack_panel,
                                 swiglu_rows, rope_head,
                                 append_head, attend_rows,
                                 merge_spans, logits_rows,
                                 kLawLoops,   embed_row,
                                 read_bytes,  peak_dot};
  return table;
}

}  // namespace specfast
