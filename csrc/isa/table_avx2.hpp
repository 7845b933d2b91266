// What the two AVX2 tables share: everything but the int8 dots.
#pragma once

namespace {

uint32_t read_bytes(const void* data, size_t bytes) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
  __m256i seen[8];
  SPECFAST_UNROLL
  for (int i = 0; i < 8; i++) seen[i] = _mm256_setzero_si256();
  const auto chunk = [p](size_t at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + at)); };
  size_t at = 0;
  for (; at + 256 <= bytes; at += 256) {
    SPECFAST_UNROLL
    for (int i = 0; i < 8; i++) seen[i] = _mm256_or_si256(seen[i], chunk(at + 32 * static_cast<size_t>(i)));
  }
  for (; at + 32 <= bytes; at += 32) seen[0] = _mm256_or_si256(seen[0], chunk(at));
  for (int i = 1; i < 8; i++) seen[0] = _mm256_or_si256(seen[0], seen[i]);
  const __m128i half = _mm_or_si128(_mm256_castsi256_si128(seen[0]), _mm256_extracti128_si256(seen[0], 1));
  const uint64_t all = static_cast<uint64_t>(_mm_cvtsi128_si64(half) | _mm_extract_epi64(half, 1));
  return static_cast<uint32_t>(all | (all >> 32));
}

uint64_t peak_dot(Activation activation, uint64_t iterations) {
  if (activation == Activation::int8) {
    const __m256i a = _mm256_set1_epi8(1);
    return kDotProducts * run_chains(_mm256_setzero_si256(), iterations, [a](__m256i& acc) { dot_once(acc, a); });
  }
  const Vec a = broadcast(0.5f);
  return 8 * run_chains(zero(), iterations, [a](Vec& acc) {
           __asm__ volatile("vfmadd231ps %1, %1, %0" : "+x"(acc) : "x"(a));
         });
}

const KernelInfo kInfos[] = {
    {"matmul_rows", "matmul_rows_q4_int8_4x8_" SPECFAST_AVX2},
    {"matmul_rows", "matmul_rows_q8_int8_4x8_" SPECFAST_AVX2},
    {"matmul_rows", "matmul_rows_any_f32_4x4_" SPECFAST_AVX2},
    {"matmul_rows", "matmul_rows_any_bf16_4x4_" SPECFAST_AVX2},
    {"swiglu_rows", "swiglu_rows_any_any_16x16_" SPECFAST_AVX2},
    {"qkv_rope_append", "qkv_rope_append_f32_f32_1x8_" SPECFAST_AVX2},
    {"attend_rows", "attend_rows_bf16_f32_4x16_" SPECFAST_AVX2},
    {"attend_rows", "attend_rows_int8_int16_4x16_" SPECFAST_AVX2},
    {"logits_rows", "logits_rows_f32_f32_1x8_" SPECFAST_AVX2},
    {"embed_rows", "embed_rows_any_f32_1x8_" SPECFAST_AVX2},
};

KernelTable avx2_table(const char* features) {
  return {SPECFAST_AVX2, features,    kInfos,      sizeof(kInfos) / sizeof(kInfos[0]),
          sum_squares,   scale_row,   round_bf16,  quantise_int8,
          matmul_rows,   nullptr,     swiglu_rows, rope_head,
          append_head,   attend_rows, merge_spans, logits_rows,
          kLawLoops,     embed_row,   read_bytes,  peak_dot};
}

}  // namespace
