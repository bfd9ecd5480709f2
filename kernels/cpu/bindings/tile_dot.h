// A single product of tiles, for tests: with the processor's tiles in a source file of its own, or with emulated ones.
#pragma once

#include <cstdint>

namespace tokenswift {

enum class TileDot { bf16, signed_unsigned, unsigned_signed };

// c += a b, where each is a tile of 16 rows of 64 bytes, as in tiles/hardware.h.
using ComputeTileDot = void (*)(TileDot kind, void* c, const void* a, const void* b);

#ifdef TOKENSWIFT_X86
void hardware_tile_dot(TileDot kind, void* c, const void* a, const void* b);  // only where tiles_allowed()
#endif

template <class Tiles>
void tile_dot(TileDot kind, void* c, const void* a, const void* b) {
  Tiles::use();
  Tiles::template load<0>(c, 64);
  Tiles::template load<1>(a, 64);
  Tiles::template load<2>(b, 64);
  switch (kind) {
    case TileDot::bf16:
      Tiles::template dot_bf16<0, 1, 2>();
      break;
    case TileDot::signed_unsigned:
      Tiles::template dot_signed_unsigned<0, 1, 2>();
      break;
    case TileDot::unsigned_signed:
      Tiles::template dot_unsigned_signed<0, 1, 2>();
      break;
  }
  Tiles::template store<0>(c, 64);
  Tiles::rest();
}

}  // namespace tokenswift
