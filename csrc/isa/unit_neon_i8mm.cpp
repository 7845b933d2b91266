// The NEON kernel table with 8-bit matrix products (Armv8.6 i8mm).
#define SPECFAST_NEON "neon_i8mm"
#include "../kernels.hpp"
#include "simd_neon.hpp"
// clang-format off: each header uses what the ones before it define
#include "elementwise.hpp"
#include "blocks.hpp"
#include "law_loops.hpp"
#include "kv_formats.hpp"
#include "attend.hpp"
#include "matmul_loads.hpp"
#include "quantise_neon.hpp"
#include "int8_neon_i8mm.hpp"
#include "int8_neon.hpp"
#include "matmul.hpp"
#include "table_neon.hpp"
// clang-format on

namespace specfast {

const KernelTable& neon_i8mm_kernels() {
  static const KernelTable table = neon_table("Armv8.6 matrix products (i8mm)", quantise_pairs);
  return table;
}

}  // namespace specfast
