#define TOKENSWIFT_VECTORS "isa/vec_generic.h"

#include "isa/table.h"
#include "isa/variants.h"

namespace tokenswift {

const Kernels& kernels_generic() {
  static const Kernels kernels = make_kernels(generic_name);
  return kernels;
}

}  // namespace tokenswift
