#define TOKENSWIFT_VECTORS "isa/vec_avx2.h"

#include "isa/table.h"
#include "isa/variants.h"

namespace tokenswift {

const Kernels& kernels_avx2() {
  static const Kernels kernels = make_kernels("avx2");
  return kernels;
}

}  // namespace tokenswift
