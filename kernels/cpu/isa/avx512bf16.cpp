#define TOKENSWIFT_VECTORS "isa/vec_avx512.h"

#include "isa/table.h"
#include "isa/variants.h"

namespace tokenswift {

const Kernels& kernels_avx512bf16() {
  static const Kernels kernels = make_kernels("avx512bf16");
  return kernels;
}

}  // namespace tokenswift
