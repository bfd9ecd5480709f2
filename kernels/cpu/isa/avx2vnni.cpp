#define TOKENSWIFT_VECTORS "isa/vec_avx2.h"

#include "isa/table.h"
#include "isa/variants.h"

namespace tokenswift {

// Only what multiplies bytes is other code than avx2's. Its sums are whole numbers, so every bit is avx2's.
const Kernels& kernels_avx2_vnni() {
  static const Kernels kernels = [] {
    Kernels own = kernels_avx2();
    own.name = "avx2-vnni";
    multiply_bytes_here(own);
    return own;
  }();
  return kernels;
}

}  // namespace tokenswift
