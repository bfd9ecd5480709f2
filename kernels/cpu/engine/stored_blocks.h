// Blocks of weights as GGUF stores them, and as rows of packed panels (formats.h).
#pragma once

#include "math/formats.h"

namespace tokenswift {

constexpr int largest_block = 256;  // weights

// One block's numbers, whatever their layout was.
struct PlainBlock {
  uint16_t halves[2];                            // d, and m or -dmin, as fp16
  int8_t scales[largest_block / block_size][2];  // s, or s and t, or both s, of each 32 weights
  uint8_t quants[largest_block];
};

// stored: format_of(element).stored_bytes
void read_stored(Element element, const char* stored, PlainBlock* out);

// One column of a panel's block. at: the panel's block; columns: of the panel
void write_packed(Element element, const PlainBlock& block, char* at, int columns, int column);
void read_packed(Element element, const char* at, int columns, int column, PlainBlock* out);

// The values, in fp32 as the gguf package computes them. out: [format_of(element).weights]
void widen_block(Element element, const PlainBlock& block, float* out);

}  // namespace tokenswift
