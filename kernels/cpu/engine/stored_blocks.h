// Blocks of weights as GGUF stores them, and as rows of packed panels (formats.h).
#pragma once

#include "math/formats.h"

namespace tokenswift {

constexpr int largest_block = 256;  // weights of the largest block

// The numbers of one block, whatever its layout was.
struct PlainBlock {
  uint16_t halves[2];                            // d, then m or -dmin, as fp16
  int8_t scales[largest_block / block_size][2];  // for each 32 weights s, or s and t, or both s
  uint8_t quants[largest_block];
};

// Reads a block as GGUF stores it. stored: format_of(element).stored_bytes bytes.
void read_stored(Element element, const char* stored, PlainBlock* out);

// Write and read one column of a block of a panel. at: where the panel's block begins. columns: how many the panel has.
void write_packed(Element element, const PlainBlock& block, char* at, int columns, int column);
void read_packed(Element element, const char* at, int columns, int column, PlainBlock* out);

// Computes the weights in fp32, with the bits that the gguf package gives them. out: [format_of(element).weights].
void widen_block(Element element, const PlainBlock& block, float* out);

}  // namespace tokenswift
