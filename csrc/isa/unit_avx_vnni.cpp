// The AVX2 kernel table with 8-bit dot products (AVX-VNNI), for CPUs that have those but no AVX-512.
#define SPECFAST_AVX2 "avx_vnni"
#include "../kernels.hpp"
#include "simd_avx2.hpp"
// clang-format off: each header uses what the ones before it define
#include "elementwise.hpp"
#include "blocks.hpp"
#include "law_loops.hpp"
#include "kv_formats.hpp"
#include "attend.hpp"
#include "matmul_loads.hpp"
#include "int8_avx_vnni_dots.hpp"
#include "int8_avx2.hpp"
#include "matmul.hpp"
#include "table_avx2.hpp"
// clang-format on

namespace specfast {

const KernelTable& avx_vnni_kernels() {
  static const KernelTable table = avx2_table("AVX2, FMA, F16C and AVX-VNNI");
  return table;
}

}  // namespace specfast
