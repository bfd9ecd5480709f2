// How activations are rounded that meet weights in blocks (formats.h), and how weights are rounded to blocks.
//
// Activations are rounded in blocks of 32 too: x[k] = scale * quant[k]. The sum over a block's k is a sum of whole
// numbers, which is exact. So only the order of the blocks has to be fixed. It is ascending, with fused multiply-adds
// in fp32:
//
//   without a minimum   acc = fma((d * s) * scale, sum((q - zero) * quant), acc)
//   with m              acc = fma(m, scale * sum(quant), fma(d * scale, sum(q * quant), acc))
//   with dmin and t     acc = fma(-dmin * t, scale * sum(quant), fma((d * s) * scale, sum(q * quant), acc))
//
// Here s is 1 in formats that have none. Where each 16 weights have an s, the formula is applied to k = 0 .. 15 first,
// then to the others. So every ISA that fuses multiply-adds has the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "math/formats.h"
#include "math/half.h"

namespace tokenswift {

// A block of 32 activations. It takes two bytes a value, so that its rows are as long as rows of bf16.
struct alignas(64) ActivationBlock {
  int8_t quants[block_size];  // the first, so that they begin a line
  float scale;                // max |x| / 127
  float scaled_sum;           // scale * sum
  int32_t sum;                // sum of the quants
  int32_t first_sum;          // sum of the first 16 quants
};
constexpr int activation_bytes = sizeof(ActivationBlock) / block_size;

namespace {  // a copy for each translation unit: see isa/vec.h

// Returns the largest magnitude of 32 values, or NaN if one of them is NaN.
inline float largest(const float* x) {
  uint32_t top = 0;
  for (int i = 0; i < block_size; ++i) {
    const uint32_t magnitude = float_bits(x[i]) & 0x7fffffff;
    top = magnitude > top ? magnitude : top;
  }
  return float_of_bits(top);
}

// Sums 16 bytes, eight at a time in a word. Each byte plus 128 is unsigned, and a word holds four sums of 16 bits.
inline int32_t sum_of_half(const int8_t* quants) {
  constexpr uint64_t low_bytes = 0x00ff00ff00ff00ff, signs = 0x8080808080808080;
  uint64_t words[2], sums = 0;
  std::memcpy(words, quants, sizeof words);
  for (uint64_t word : words) sums += ((word ^ signs) & low_bytes) + ((word ^ signs) >> 8 & low_bytes);
  return int32_t(sums * 0x0001000100010001 >> 48) - 16 * 128;
}

// Rounds 32 activations to a block. Where a value is not finite, the scale is not finite either, nor is any product
// with it.
inline void quantise_block(const float* x, ActivationBlock& out) {
  const float top = largest(x), inverse = top > 1e-30f ? 127.0f / top : 0.0f;
  for (int i = 0; i < block_size; ++i) out.quants[i] = int8_t(nearest_whole(x[i] * inverse));
  out.scale = top / 127.0f;
  out.first_sum = sum_of_half(out.quants);
  out.sum = out.first_sum + sum_of_half(out.quants + block_size / 2);
  out.scaled_sum = out.scale * float(out.sum);
}

// Rounds n activations to blocks. The last block is filled with zeros.
inline void quantise_row(const float* x, int n, ActivationBlock* out) {
  for (; n >= block_size; n -= block_size, x += block_size) quantise_block(x, *out++);
  if (n > 0) {
    float block[block_size] = {};
    std::memcpy(block, x, n * sizeof *x);
    quantise_block(block, *out);
  }
}

// Rounds 32 weights to a stored q8 block. The scale is rounded before the quants are computed, so that these correct
// its rounding error.
inline void quantise_weights(const float* w, char* out) {
  const uint16_t half = float_to_half(largest(w) / 127.0f);
  const float d = half_to_float(half), inverse = d > 0 ? 1.0f / d : 0.0f;
  std::memcpy(out, &half, sizeof half);
  for (int i = 0; i < block_size; ++i) {
    const float scaled = w[i] * inverse;
    const int32_t quant = scaled > 127.0f ? 127 : scaled < -127.0f ? -127 : nearest_whole(scaled);
    out[2 + i] = char(quant);
  }
}

// Rounds 32 weights to a stored q4 block, in 15 steps from the least to the greatest. This finds the same quants again
// for weights that came from such a block.
inline void quantise_to_four_bits(const float* w, char* out) {
  float least = w[0], greatest = w[0];
  for (int i = 1; i < block_size; ++i) {
    least = w[i] < least ? w[i] : least;
    greatest = w[i] > greatest ? w[i] : greatest;
  }
  const uint16_t halves[2] = {float_to_half((greatest - least) / 15.0f), float_to_half(least)};
  const float d = half_to_float(halves[0]), m = half_to_float(halves[1]), inverse = d > 0 ? 1.0f / d : 0.0f;
  std::memcpy(out, halves, sizeof halves);
  uint8_t quants[block_size];
  for (int i = 0; i < block_size; ++i) {
    const float scaled = (w[i] - m) * inverse;
    quants[i] = scaled > 15.0f ? 15 : scaled > 0.0f ? uint8_t(nearest_whole(scaled)) : 0;
  }
  for (int i = 0; i < block_size / 2; ++i) out[4 + i] = char(quants[i] | quants[i + block_size / 2] << 4);
}

// Computes the weights of a q4 block.
inline void widen_four_bits(const char* block, float* w) {
  uint16_t halves[2];
  std::memcpy(halves, block, sizeof halves);
  const float d = half_to_float(halves[0]), m = half_to_float(halves[1]);
  for (int i = 0; i < block_size; ++i) {
    const uint8_t byte = uint8_t(block[4 + i % 16]);
    w[i] = d * float(i < 16 ? byte & 15 : byte >> 4) + m;
  }
}

}  // namespace
}  // namespace tokenswift
