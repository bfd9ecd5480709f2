#include <stdexcept>
#include <vector>

#include "isa/kernels.h"
#include "isa/variants.h"
#include "isa/permission.h"

#ifdef TOKENSWIFT_X86
#include <cpuid.h>
#endif

namespace tokenswift {
namespace {

struct Variant {
  const char* name;
  bool runnable;
  const Kernels& (*kernels)();
  bool emulated = false;  // whether it computes in plain C++ what another variant has instructions for
};

#ifdef TOKENSWIFT_X86
// Asks the processor itself, because not every compiler's __builtin_cpu_supports knows F16C.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

// AVX-VNNI: dot products of bytes in vectors of 256 bits. Intel's cores without AVX-512 have it from Alder Lake on.
bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}
#endif

std::vector<Variant> variants() {
  std::vector<Variant> all;
#ifdef TOKENSWIFT_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool dots = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  all.push_back({"amx", avx512 && dots && tiles_allowed(nullptr), kernels_amx});
  // Intel's cores multiply bf16 pairs at half the rate of fp32 (123 and 245 GFLOP/s a core of Sapphire Rapids), AMD's
  // at twice that (504 and 275 of Zen 5). Ten rows after 16 384 tokens took 100 and 66 ms on Emerald Rapids.
  const Variant widened{"avx512", avx512, kernels_avx512}, pairs{"avx512bf16", avx512 && dots, kernels_avx512bf16};
  const bool slow_pairs = __builtin_cpu_is("intel");
  all.push_back(slow_pairs ? widened : pairs);
  all.push_back(slow_pairs ? pairs : widened);
  all.push_back({"avx2-vnni", avx2 && has_avx_vnni(), kernels_avx2_vnni});
  all.push_back({"avx2", avx2, kernels_avx2});
#endif
  all.push_back({generic_name, true, kernels_generic});
  all.push_back({"amx-emulated", true, kernels_amx_emulated, true});
  return all;
}

}  // namespace

std::string runnable_kernels(bool emulated) {
  std::string names;
  for (const Variant& variant : variants()) {
    if (variant.runnable && variant.emulated == emulated)
      names += (names.empty() ? "" : ", ") + std::string(variant.name);
  }
  return names;
}

const Kernels& choose_kernels(const std::string& wanted) {
  for (const Variant& variant : variants()) {
    if (variant.runnable && (wanted.empty() || wanted == variant.name)) return variant.kernels();
  }
  throw std::invalid_argument("TOKENSWIFT_ISA: '" + wanted + "' is not allowed; this machine runs " +
                              runnable_kernels(false) + ", and slowly " + runnable_kernels(true));
}

}  // namespace tokenswift
