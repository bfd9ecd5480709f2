#define TOKENSWIFT_VECTORS "tiles/vec_portable.h"
#define TOKENSWIFT_TILES "tiles/emulated.h"

#include "isa/variants.h"
#include "tiles/table.h"

namespace tokenswift {

const Kernels& kernels_amx_emulated() {
  static const Kernels kernels = make_tile_kernels("amx-emulated");
  return kernels;
}

}  // namespace tokenswift
