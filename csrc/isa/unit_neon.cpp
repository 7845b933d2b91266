// The NEON kernel table (Armv8.2 with dot products).
#define SPECFAST_NEON "neon"
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
#include "int8_neon_dotprod.hpp"
#include "int8_neon.hpp"
#include "matmul.hpp"
#include "table_neon.hpp"
// clang-format on

namespace specfast {

const KernelTable& neon_kernels() {
  static const KernelTable table = neon_table("Armv8.2 dot products (asimddp)", quantise_int8);
  return table;
}

}  // namespace specfast
