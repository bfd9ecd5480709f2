// The table of functions of a variant that multiplies bf16 and pages of bytes by tiles. Weights in blocks are
// multiplied as without tiles: the sums of each 32 weights have to leave the tile again, and that took as long.
#pragma once

#include "isa/table.h"
#include "tiles/byte_pages.h"
#include "tiles/pages.h"
#include "tiles/products.h"

namespace tokenswift {
namespace {

Kernels make_tile_kernels(const char* name) {
  Kernels kernels = make_kernels(name);
  kernels.rest = Tiles::rest;
  kernels.tile = 2 * tile_rows;
  kernels.elements[int(Element::bf16)] = {sizeof(uint16_t), round_padded, multiply_by_tiles};
  kernels.bf16_pages = {tile_values, sizeof(uint16_t), round_padded, visit_by_tiles, best_score_by_tiles};
  kernels.int8_pages.visit = visit_bytes_by_tiles;
  return kernels;
}

}  // namespace
}  // namespace tokenswift
