#define TOKENSWIFT_VECTORS "isa/vec_avx512.h"
#define TOKENSWIFT_TILES "tiles/hardware.h"

#include "isa/variants.h"
#include "tiles/table.h"

namespace tokenswift {

const Kernels& kernels_amx() {
  static const Kernels kernels = make_tile_kernels("amx");
  return kernels;
}

}  // namespace tokenswift
