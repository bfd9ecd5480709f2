// How a page of bf16 becomes a copy of bytes (page_bytes.h). Magnitudes of bf16 are compared as bits. These have the
// same order, with infinity and NaN above all numbers.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>

#include "isa/kernels.h"
#include "math/bf16.h"
#include "math/half.h"

namespace tokenswift {
namespace {

// How one token's key or value becomes int8. The largest magnitude becomes 127. `divisor` is infinite where every quant
// is 0. This is so where the values are too small for a scale, and where one of them is infinite or NaN. In the latter
// case the scale is not finite either.
struct Quantum {
  float scale, divisor;
};

inline Quantum quantum(float top) {
  const float scale = top / 127.0f;
  if (scale >= FLT_MIN && scale <= FLT_MAX) return {scale, scale};
  return {scale < FLT_MIN ? 0.0f : scale, INFINITY};
}

// out[i] = the quant of x[i] by divisor[i]. n: a multiple of 16.
inline void narrow(const uint16_t* x, const float* divisor, int n, int8_t* out) {
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = float_bits(to_float(x[i]) / divisor[i] + rounding_bias);
    out[i] = divisor[i] == INFINITY ? int8_t(0) : int8_t(bits);
  }
}

// Joins pairs to fours: out[i] = {a[i][0], a[i][1], b[i][0], b[i][1]}, exclusive or `turn`. a, b: [n][2].
inline void join_pairs(const int8_t* a, const int8_t* b, int n, uint32_t turn, char* out) {
  for (int i = 0; i < n; ++i) {
    uint16_t pairs[2];
    std::memcpy(&pairs[0], a + 2 * i, sizeof pairs[0]);
    std::memcpy(&pairs[1], b + 2 * i, sizeof pairs[1]);
    const uint32_t four = (uint32_t(pairs[1]) << 16 | pairs[0]) ^ turn;
    std::memcpy(out + 4 * i, &four, sizeof four);
  }
}

// Makes quants of the values of two tokens, [head_dim][2], and writes the tokens' scales.
inline void narrow_values(const uint16_t* both, int head_dim, int8_t* quants, float* scales) {
  constexpr int part = 32;
  uint16_t largest[part] = {};
  for (int i = 0; i < 2 * head_dim; i += part) {
    for (int j = 0; j < part; ++j) {
      const uint16_t size = both[i + j] & 0x7fff;
      largest[j] = size > largest[j] ? size : largest[j];
    }
  }
  float divisor[part];
  for (int token = 0; token < 2; ++token) {
    uint16_t most = 0;
    for (int j = token; j < part; j += 2) most = largest[j] > most ? largest[j] : most;
    const Quantum of = quantum(to_float(most));
    scales[token] = of.scale;
    for (int j = token; j < part; j += 2) divisor[j] = of.divisor;
  }
  for (int i = 0; i < 2 * head_dim; i += part) narrow(both + i, divisor, part, quants + i);
}

// Makes the copy of a block. block: keys [head_dim / 2][64][2], then values [32][head_dim][2].
inline void copy_page(const char* block, int head_dim, char* out) {
  constexpr int width = 2 * page_size;  // two dimensions of all keys
  const auto* keys = reinterpret_cast<const uint16_t*>(block);
  const uint16_t* values = keys + page_size * head_dim;
  auto* scales = reinterpret_cast<float*>(out + 2 * page_size * head_dim);
  uint16_t top[width] = {};
  for (int d = 0; d < head_dim / 2; ++d) {
    for (int i = 0; i < width; ++i) {
      const uint16_t size = keys[d * width + i] & 0x7fff;
      top[i] = size > top[i] ? size : top[i];
    }
  }
  float divisor[width];
  for (int lane = 0; lane < page_size; ++lane) {
    const uint16_t larger = top[2 * lane] > top[2 * lane + 1] ? top[2 * lane] : top[2 * lane + 1];
    const Quantum by = quantum(to_float(larger));
    scales[lane] = by.scale;
    divisor[2 * lane] = divisor[2 * lane + 1] = by.divisor;
  }
  alignas(64) int8_t first[2 * longest_head], second[2 * longest_head];
  for (int d = 0; d < head_dim / 2; d += 2, out += 2 * width) {
    narrow(keys + d * width, divisor, width, first);
    narrow(keys + (d + 1) * width, divisor, width, second);
    join_pairs(first, second, page_size, 0x80808080u, out);  // adds 128 to each
  }
  for (int token = 0; token < page_size; token += 4, out += 4 * head_dim, values += 4 * head_dim) {
    narrow_values(values, head_dim, first, scales + page_size + token);
    narrow_values(values + 2 * head_dim, head_dim, second, scales + page_size + token + 2);
    join_pairs(first, second, head_dim, 0, out);
  }
}

}  // namespace
}  // namespace tokenswift
