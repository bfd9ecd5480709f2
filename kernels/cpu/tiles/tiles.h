// The tiles that this translation unit computes with: Tiles of the header that TOKENSWIFT_TILES names. See isa/vec.h.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "isa/kernels.h"
#include "math/bf16.h"
#include "math/dot.h"

#ifndef TOKENSWIFT_TILES
#define TOKENSWIFT_TILES "tiles/emulated.h"
#endif

#include TOKENSWIFT_TILES

namespace tokenswift {
namespace {

constexpr int tile_rows = 16, tile_bytes = 64, tile_columns = 16;
constexpr int tile_values = tile_bytes / 2;  // bf16 values of a row

static_assert(Isa::lanes == tile_columns, "a row of sums is one vector");

// Loads a tile whose first `rows` rows are there. The others become zeros.
template <int t>
void load_part(const char* p, size_t stride, int rows) {
  if (rows >= tile_rows) return Tiles::load<t>(p, stride);
  alignas(64) char whole[tile_rows][tile_bytes] = {};
  for (int row = 0; row < rows; ++row) std::memcpy(whole[row], p + row * stride, tile_bytes);
  Tiles::load<t>(whole, tile_bytes);
}

// Begin and store a row of four tiles, 0 to 3. Rows of p are [64] sums of four bytes.
inline void zero_four() {
  Tiles::zero<0>();
  Tiles::zero<1>();
  Tiles::zero<2>();
  Tiles::zero<3>();
}
inline void store_four(void* p) {
  char* const at = static_cast<char*>(p);
  Tiles::store<0>(at, 4 * tile_bytes);
  Tiles::store<1>(at + tile_bytes, 4 * tile_bytes);
  Tiles::store<2>(at + 2 * tile_bytes, 4 * tile_bytes);
  Tiles::store<3>(at + 3 * tile_bytes, 4 * tile_bytes);
}

// Rounds 16 floats to bf16 as VCVTNEPS2BF16 does: to nearest, ties to even, with denormal numbers taken for zero.
inline void round_to_bf16(Vec x, uint16_t* out) {
#ifdef __AVX512BF16__
  NativeBf16Dot::round(x, out);
#else
  float values[tile_columns];
  Isa::store(values, x);
  for (int i = 0; i < tile_columns; ++i) {
    const bool denormal = std::fabs(values[i]) < FLT_MIN;
    out[i] = to_bf16(denormal ? std::copysign(0.0f, values[i]) : values[i]);
  }
#endif
}

// Rounds n values and fills the last 32 with zeros. A tile takes that many, and what lies behind the n may be NaN.
inline void round_padded(const float* x, int n, void* out) {
  auto* values = static_cast<uint16_t*>(out);
  int i = 0;
  for (; i + tile_columns <= n; i += tile_columns) round_to_bf16(Isa::load(x + i), values + i);
  if (i < n) {
    float rest[tile_columns] = {};
    std::copy(x + i, x + n, rest);
    round_to_bf16(Isa::load(rest), values + i);
    i += tile_columns;
  }
  std::fill(values + i, values + round_up(n, tile_values), uint16_t(0));
}

}  // namespace
}  // namespace tokenswift
