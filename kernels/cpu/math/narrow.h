// How a page of bf16 becomes a page of bytes (page_bytes.h). Magnitudes of bf16 are compared as bits. These have the
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

// The place of a token's values among the bytes of a dimension: the byte of a four, four * 4 + byte.
constexpr int value_place(int token) { return token / 32 * 32 + token % 8 * 4 + token / 8 % 2 * 2 + token / 16 % 2; }

// The token whose values have a place.
constexpr int token_at(int place) { return place / 32 * 32 + place % 4 / 2 * 8 + place % 2 * 16 + place / 4 % 8; }

// Joins pairs of keys' quants to fours of bytes: out[i] = {a[i][0], a[i][1], b[i][0], b[i][1]}, each 128 larger. a, b:
// [n][2].
inline void join_keys(const int8_t* a, const int8_t* b, int n, char* out) {
  for (int i = 0; i < n; ++i) {
    uint16_t pairs[2];
    std::memcpy(&pairs[0], a + 2 * i, sizeof pairs[0]);
    std::memcpy(&pairs[1], b + 2 * i, sizeof pairs[1]);
    const uint32_t four = (uint32_t(pairs[1]) << 16 | pairs[0]) ^ 0x80808080u;
    std::memcpy(out + 4 * i, &four, sizeof four);
  }
}

// Joins pairs of values' quants to fours: first[i] = {a[i][0], b[i][0], c[i][0], d[i][0]}, and second[i] of [i][1].
// quants: a, b, c and d, each [n][2].
inline void join_values(const int8_t (*quants)[2 * longest_head], int n, char* first, char* second) {
  for (int i = 0; i < n; ++i) {
    for (int part = 0; part < 4; ++part) {
      first[4 * i + part] = char(quants[part][2 * i]);
      second[4 * i + part] = char(quants[part][2 * i + 1]);
    }
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
  alignas(64) int8_t quants[4][2 * longest_head];
  for (int d = 0; d < head_dim / 2; d += 2, out += 2 * width) {
    narrow(keys + d * width, divisor, width, quants[0]);
    narrow(keys + (d + 1) * width, divisor, width, quants[1]);
    join_keys(quants[0], quants[1], page_size, out);
  }
  for (int four = 0; four < page_size / 4; four += 2, out += 8 * head_dim) {
    for (int part = 0; part < 4; ++part) {
      const int token = token_at(4 * four + part);
      narrow_values(values + token * head_dim, head_dim, quants[part], scales + page_size + token);
    }
    join_values(quants, head_dim, out, out + 4 * head_dim);
  }
}

}  // namespace
}  // namespace tokenswift
