// The tables of the variants that were compiled in.
#pragma once

#include "isa/kernels.h"

namespace tokenswift {

const Kernels& kernels_amx();
const Kernels& kernels_avx512bf16();
const Kernels& kernels_avx512();
const Kernels& kernels_avx2();
const Kernels& kernels_avx2_vnni();  // has the bits of avx2
const Kernels& kernels_generic();
const Kernels& kernels_amx_emulated();  // has the bits of amx

// There are two names, because the bits are different where the compiler's target fuses products with sums (aarch64).
#ifdef __FP_FAST_FMAF
constexpr const char* generic_name = "generic-fma";
#else
constexpr const char* generic_name = "generic";
#endif

}  // namespace tokenswift
