// The AVX2 kernel table (with FMA and F16C, no VNNI).
#define SPECFAST_AVX2 "avx2"
#include "../kernels.hpp"
#include "simd_avx2.hpp"
// clang-format off: each header uses what the ones before it define
#include "elementwise.hpp"
#include "blocks.hpp"
#include "law_loops.hpp"
#include "kv_formats.hpp"
#include "attend.hpp"
#include "matmul_loads.hpp"
#include "int8_avx2_dots.hpp"
#include "int8_avx2.hpp"
#include "matmul.hpp"
#include "table_avx2.hpp"
// clang-format on

namespace specfast {

const KernelTable& avx2_kernels() {
  static const KernelTable table = avx2_table("AVX2, FMA and F16C");
  return table;
}

}  // namespace specfast
