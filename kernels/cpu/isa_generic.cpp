#include "vec_generic.h"
// The vectors come first: the other headers are written in their terms.
#include "table.h"
#include "variants.h"

namespace tokenswift {

const Kernels& kernels_generic() {
  static const Kernels kernels = make_kernels(generic_name);
  return kernels;
}

}  // namespace tokenswift
