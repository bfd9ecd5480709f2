// The tables of the variants that were compiled in.
#pragma once

#include "kernels.h"

namespace tokenswift {

const Kernels& kernels_avx512bf16();
const Kernels& kernels_avx512();
const Kernels& kernels_avx2();
const Kernels& kernels_generic();

}  // namespace tokenswift
