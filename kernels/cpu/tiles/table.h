// The table of functions of a variant whose bf16 products and products of bytes are made by tiles.
#pragma once

#include "isa/table.h"
#include "tiles/blocks.h"
#include "tiles/byte_pages.h"
#include "tiles/pages.h"
#include "tiles/products.h"

namespace tokenswift {
namespace {

template <Element... elements>
void multiply_by_tiles(Kernels& kernels) {
  ((kernels.elements[int(elements)].multiply = multiply_blocks_by_tiles<elements>), ...);
}

Kernels make_tile_kernels(const char* name) {
  Kernels kernels = make_kernels(name);
  kernels.rest = Tiles::rest;
  kernels.tile = 2 * tile_rows;
  kernels.elements[int(Element::bf16)] = {sizeof(uint16_t), round_padded, multiply_by_tiles};
  kernels.bf16_pages = {tile_values, sizeof(uint16_t), round_padded, visit_by_tiles, best_score_by_tiles};
  kernels.int8_pages.visit = visit_bytes_by_tiles;
  multiply_by_tiles<Element::q8, Element::q4, Element::q4_0, Element::q5_0, Element::q5_1, Element::q4_k, Element::q5_k,
                    Element::q6_k, Element::iq4_nl, Element::iq4_xs>(kernels);
  return kernels;
}

}  // namespace
}  // namespace tokenswift
