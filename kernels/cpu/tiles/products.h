// The products of rows of activations with one packed panel of weights, by tiles.
//
// The panels of bf16 weights, [steps][32][2], are two tiles of 16 steps side by side. An output element is the sum of
// the products of 32 k each, in the order of k, as `Tiles::dot_bf16` computes them.
#pragma once

#include "math/gemm.h"
#include "tiles/tiles.h"

namespace tokenswift {
namespace {

constexpr int panel_columns = 2 * tile_columns;
constexpr int panel_bytes = panel_columns * 4;  // of a step, and of a row of sums
static_assert(panel_columns == Isa::gemm_vectors * Isa::lanes, "a panel is two tiles wide");

// Stores sums of `rows` rows of a panel, which lie in the tiles `left` and left + 1.
template <int left>
void store_rows(int rows, float* out, size_t out_stride) {
  if (rows >= tile_rows) {
    Tiles::store<left>(out, out_stride * sizeof *out);
    Tiles::store<left + 1>(out + tile_columns, out_stride * sizeof *out);
    return;
  }
  alignas(64) float sums[tile_rows][panel_columns];
  Tiles::store<left>(sums, panel_bytes);
  Tiles::store<left + 1>(sums[0] + tile_columns, panel_bytes);
  for (int row = 0; row < rows; ++row) std::memcpy(out + row * out_stride, sums[row], panel_bytes);
}

// Multiplies one or two tiles of rows (`tall`) with a panel. Rows of x are `x_bytes` apart.
template <int tall>
void multiply_tiles(const char* panel, int steps, const char* x, size_t x_bytes, int rows, float* out,
                    size_t out_stride) {
  Tiles::zero<0>();
  Tiles::zero<1>();
  if constexpr (tall == 2) {
    Tiles::zero<2>();
    Tiles::zero<3>();
  }
  for (; steps > 0; steps -= tile_rows, panel += tile_rows * panel_bytes, x += tile_bytes) {
    load_part<6>(panel, panel_bytes, steps);
    load_part<7>(panel + tile_bytes, panel_bytes, steps);
    Tiles::load<4>(x, x_bytes);
    Tiles::dot_bf16<0, 4, 6>();
    Tiles::dot_bf16<1, 4, 7>();
    if constexpr (tall == 2) {
      Tiles::load<5>(x + tile_rows * x_bytes, x_bytes);
      Tiles::dot_bf16<2, 5, 6>();
      Tiles::dot_bf16<3, 5, 7>();
    }
#pragma GCC unroll 32
    for (int at = 0; at < tile_rows * panel_bytes; at += line_bytes) Isa::prefetch(panel + prefetch_bytes + at);
  }
  store_rows<0>(rows, out, out_stride);
  if constexpr (tall == 2) store_rows<2>(rows - tile_rows, out + tile_rows * out_stride, out_stride);
}

inline void multiply_by_tiles(const void* panel, int steps, const void* x, size_t x_stride, int rows, float* out,
                              size_t out_stride) {
  Tiles::use();
  const size_t x_bytes = rows == 1 ? 0 : x_stride * sizeof(uint16_t);  // one row sixteen times reads one line, not more
  const auto* from = static_cast<const char*>(panel);
  const auto* operands = static_cast<const char*>(x);
  for (int row = 0; row < rows; row += 2 * tile_rows) {
    const int count = std::min(rows - row, 2 * tile_rows);
    (count > tile_rows ? multiply_tiles<2> : multiply_tiles<1>)(from, steps, operands + row * x_bytes, x_bytes, count,
                                                                out + row * out_stride, out_stride);
  }
}

}  // namespace
}  // namespace tokenswift
