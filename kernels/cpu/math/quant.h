// Weights in blocks of 32 along k, and the activations that meet them.
//
//   q8   w[k] = d (q[k] - 128)     d is fp16, q an unsigned byte    8.5 bits a weight
//   q4   w[k] = d q[k] + m         d and m are fp16, q has 4 bits    5 bits a weight
//
// Activations are rounded block by block too: x[k] = scale * quant[k]. A block's sum over k is one of whole numbers
// and exact, so only the order of the blocks is left to fix: ascending, with fused multiply-adds in fp32,
//
//   q8   acc = fma(d * scale, sum((q - 128) * quant), acc)
//   q4   acc = fma(m, scale * sum(quant), fma(d * scale, sum(q * quant), acc))
//
// which has the same bits on every ISA that fuses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "math/half.h"

namespace tokenswift {

constexpr int block_size = 32;

// Packed, a block of a panel is d [columns], with q4 then m [columns], then the quants, in groups of 4 along k:
//   q8   [8 groups][columns][4]
//   q4   [4 groups][columns][4], the low halves of the bytes k = 0 .. 15, the high ones k = 16 .. 31
constexpr size_t q8_block_bytes(int columns) { return size_t(columns) * (2 + 32); }
constexpr size_t q4_block_bytes(int columns) { return size_t(columns) * (2 + 2 + 16); }

// A row's block as it comes in, which is how GGUF stores Q8_0 and Q4_1: d and 32 signed bytes; d, m and 16 bytes of
// halves as above.
constexpr size_t q8_row_bytes = 2 + 32, q4_row_bytes = 2 + 2 + 16;

// 32 activations. Two bytes a value, so that rows of them are laid out as those of bf16.
struct alignas(64) ActivationBlock {
  float scale;       // max |x| / 127
  float scaled_sum;  // scale * sum
  int32_t sum;       // of the quants
  int8_t quants[block_size];
};
constexpr int activation_bytes = sizeof(ActivationBlock) / block_size;

namespace {  // a copy for each translation unit: see vec_avx512.h

// To the nearest whole number, ties to even, for |x| < 2^22; some other one beyond.
inline int32_t nearest_whole(float x) { return int32_t(float_bits(x + 12582912.0f) - float_bits(12582912.0f)); }

// The largest magnitude; NaN if there is one.
inline float largest(const float* x) {
  uint32_t top = 0;
  for (int i = 0; i < block_size; ++i) {
    const uint32_t magnitude = float_bits(x[i]) & 0x7fffffff;
    top = magnitude > top ? magnitude : top;
  }
  return float_of_bits(top);
}

// x: [n], zero behind. What is not finite makes the scale so, and with it every product.
inline void quantise_row(const float* x, int n, ActivationBlock* out) {
  for (; n > 0; n -= block_size, x += block_size, ++out) {
    float block[block_size] = {};
    std::memcpy(block, x, (n < block_size ? n : block_size) * sizeof *x);
    const float top = largest(block);
    const float inverse = top > 1e-30f ? 127.0f / top : 0.0f;
    out->scale = top / 127.0f;
    int32_t sum = 0;
    for (int i = 0; i < block_size; ++i) {
      const int32_t quant = nearest_whole(block[i] * inverse);
      out->quants[i] = int8_t(quant);
      sum += int8_t(quant);
    }
    out->sum = sum;
    out->scaled_sum = out->scale * float(sum);
  }
}

// 32 weights as a row's q8 block: the scale is rounded first, so that the quants make up for what it lost.
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

// 32 weights as a row's q4 block: from the least to the greatest in 15 steps, which finds the quants again of weights
// that came from such blocks.
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

// What such a block stands for.
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
