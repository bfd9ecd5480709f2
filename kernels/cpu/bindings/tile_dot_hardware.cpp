#include "bindings/tile_dot.h"
#include "tiles/hardware.h"

namespace tokenswift {

void hardware_tile_dot(TileDot kind, void* c, const void* a, const void* b) { tile_dot<Tiles>(kind, c, a, b); }

}  // namespace tokenswift
