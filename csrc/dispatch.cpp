// Run-time choice of the kernel table.
#include "dispatch.hpp"

#include <cstdlib>

#if defined(SPECFAST_HAS_AVX2)
#include <cpuid.h>
#endif

#if defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace specfast {
namespace {

#if defined(SPECFAST_HAS_AVX2)
bool cpu_has_avx2() {
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0;  // F16C is asked of the CPU itself: older Clang has no name for it
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
         (c & (1u << 29)) != 0;
}
#endif

#if defined(SPECFAST_HAS_AVX_VNNI)
bool cpu_has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;  // asked of the CPU itself too
  return cpu_has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4)) != 0;
}
#endif

#if defined(SPECFAST_HAS_AVX512)
bool cpu_has_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("fma");
}
#endif

#if defined(SPECFAST_HAS_NEON)
bool cpu_has_dotprod() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return true;  // every Apple silicon core has it
#endif
}
#endif

#if defined(SPECFAST_HAS_NEON_I8MM)
bool cpu_has_i8mm() {
#if defined(__linux__)
  constexpr unsigned long kI8mm = 1ul << 13;  // HWCAP2_I8MM, which older kernel headers lack
  return cpu_has_dotprod() && (getauxval(AT_HWCAP2) & kI8mm) != 0;
#elif defined(__APPLE__)
  int has = 0;
  size_t bytes = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_I8MM", &has, &bytes, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}
#endif

}  // namespace

const std::vector<IsaEntry>& compiled_isas() {
  static const std::vector<IsaEntry> entries = [] {
    std::vector<IsaEntry> list{{&scalar_kernels(), true}};
#if defined(SPECFAST_HAS_AVX2)
    list.push_back({&avx2_kernels(), cpu_has_avx2()});
#endif
#if defined(SPECFAST_HAS_AVX_VNNI)
    list.push_back({&avx_vnni_kernels(), cpu_has_avx_vnni()});
#endif
#if defined(SPECFAST_HAS_AVX512)
    list.push_back({&avx512_kernels(), cpu_has_avx512()});
#endif
#if defined(SPECFAST_HAS_NEON)
    list.push_back({&neon_kernels(), cpu_has_dotprod()});
#endif
#if defined(SPECFAST_HAS_NEON_I8MM)
    list.push_back({&neon_i8mm_kernels(), cpu_has_i8mm()});
#endif
    return list;
  }();
  return entries;
}

const KernelTable* find_kernels(const std::string& isa, std::string* why) {
  std::string wanted = isa, remedy = "choose another isa, or none for the best";
  if (wanted.empty()) {
    if (const char* forced = std::getenv("SPECFAST_ISA")) {
      wanted = forced;
      remedy = "it was asked for by SPECFAST_ISA; unset it for the best";
    }
  }
  const auto& entries = compiled_isas();
  std::string names;
  for (size_t i = entries.size(); i-- > 0;) {
    const IsaEntry& entry = entries[i];
    names += (names.empty() ? "" : ", ") + std::string(entry.table->isa);
    if (wanted.empty() ? entry.supported : wanted == entry.table->isa) {
      if (entry.supported) return entry.table;
      *why = "this CPU cannot run '" + wanted + "' kernels: they need " + entry.table->features + "; " + remedy;
      return nullptr;
    }
  }
  *why = "no kernels named '" + wanted + "' were compiled; this build has " + names + "; " + remedy;
  return nullptr;
}

}  // namespace specfast
