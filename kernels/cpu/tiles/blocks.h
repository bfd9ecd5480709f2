// The products of rows of activations with a packed panel of weights in blocks, by tiles. They have the bits of
// math/blocks.h: sums of a block's products are whole numbers, and what is done with them is the same.
//
// A block of 32 weights of 16 columns fills the upper half of a tile. The lower half is zero, so it does not matter
// what lies behind a row's quants.
#pragma once

#include "math/blocks.h"
#include "tiles/tiles.h"

namespace tokenswift {
namespace {

constexpr int few_rows = 7;  // up to so many are multiplied without tiles, which saves no time

// The bytes of one part of a block, as two tiles. Rows of other parts stay zero.
struct BlockTiles {
  alignas(64) uint8_t bytes[2][tile_rows][tile_bytes] = {};
};

// Adds what a part's sums come to, to acc[i][j]: see add_part.
template <class Block, int part, int M>
inline __attribute__((always_inline)) void add_sums(Vec (&acc)[M][2], const Block& block, const uint16_t* halves,
                                                    const ActivationBlock* x, size_t x_stride,
                                                    const int32_t (&sums)[tile_rows][gemm_columns]) {
  constexpr BlockFormat format = Block::format;
  Vec d[2], minimum[2];
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    d[j] = Isa::load_halfs(halves + j * Isa::lanes);
    if constexpr (format.scales > 0) d[j] = Isa::mul(d[j], block.whole(part, j));
    if constexpr (format.minimum) minimum[j] = Isa::load_halfs(halves + gemm_columns + j * Isa::lanes);
    if constexpr (format.minimum && format.scales > 0) minimum[j] = Isa::mul(minimum[j], block.whole(format.scales, j));
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    const ActivationBlock& row = x[i * x_stride];
    const int32_t sum = Block::parts == 1 ? row.sum : part == 0 ? row.first_sum : row.sum - row.first_sum;
    const Vec scale = Isa::splat(row.scale);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const Isa::Wholes whole = Isa::add_whole(&sums[i][j * Isa::lanes], -format.zero * sum);
      acc[i][j] = Isa::fma(Isa::mul(d[j], scale), Isa::to_floats(whole), acc[i][j]);
      if constexpr (format.minimum) acc[i][j] = Isa::fma(minimum[j], Isa::splat(row.scaled_sum), acc[i][j]);
    }
  }
}

template <class Block, int part, int M>
inline __attribute__((always_inline)) void add_part_by_tiles(Vec (&acc)[M][2], const Block& block,
                                                             const uint16_t* halves, const ActivationBlock* x,
                                                             size_t x_stride, BlockTiles& tiles) {
  constexpr int groups = 8 / Block::parts;
  each_of<part * groups, groups>([&](auto g) __attribute__((always_inline)) {
    for (int j = 0; j < 2; ++j) Isa::store_bytes(tiles.bytes[j][g], block.template quants<g>(j));
  });
  alignas(64) int32_t sums[tile_rows][gemm_columns];
  Tiles::zero<0>();
  Tiles::zero<1>();
  Tiles::load<6>(tiles.bytes[0], tile_bytes);
  Tiles::load<7>(tiles.bytes[1], tile_bytes);
  Tiles::load<4>(x->quants, x_stride * sizeof *x);
  Tiles::dot_signed_unsigned<0, 4, 6>();
  Tiles::dot_signed_unsigned<1, 4, 7>();
  Tiles::store<0>(sums, sizeof *sums);
  Tiles::store<1>(sums[0] + tile_columns, sizeof *sums);
  add_sums<Block, part>(acc, block, halves, x, x_stride, sums);
}

// Multiplies M rows, of which `rows` are wanted.
template <Element element, int M>
void multiply_block_tiles(const char* panel, int steps, const ActivationBlock* x, size_t x_stride, int rows, float* out,
                          size_t out_stride) {
  using Block = PackedBlock<element>;
  constexpr BlockFormat format = Block::format;
  Vec acc[M][2];
  each<M, 2>([&](int i, int j) { acc[i][j] = Isa::zero(); });
  BlockTiles first, second;
  for (int step = 0; step < steps; ++step) {
    const auto* halves = reinterpret_cast<const uint16_t*>(panel);
    panel += format.halves() * 2 * gemm_columns;
    for (int i = 0; i < format.blocks(); ++i, panel += Block::bytes, ++x) {
#pragma GCC unroll 32
      for (int at = 0; at < Block::bytes; at += line_bytes) Isa::prefetch(panel + prefetch_bytes + at);
      const Block block{reinterpret_cast<const uint8_t*>(panel)};
      add_part_by_tiles<Block, 0>(acc, block, halves, x, x_stride, first);
      if constexpr (Block::parts == 2) add_part_by_tiles<Block, 1>(acc, block, halves, x, x_stride, second);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    if (i >= rows) break;
    for (int j = 0; j < 2; ++j) Isa::store(out + i * out_stride + j * Isa::lanes, acc[i][j]);
  }
}

template <Element element>
void multiply_blocks_by_tiles(const void* panel, int steps, const void* x, size_t x_stride, int rows, float* out,
                              size_t out_stride) {
  if (rows <= few_rows) return multiply<Blocks<element>>(panel, steps, x, x_stride, rows, out, out_stride);
  Tiles::use();
  const auto* from = static_cast<const char*>(panel);
  const auto* operands = static_cast<const ActivationBlock*>(x);
  x_stride /= block_size;
  for (int row = 0; row < rows; row += tile_rows) {
    const int count = std::min(rows - row, tile_rows);
    const auto some = count <= 8    ? multiply_block_tiles<element, 8>
                      : count <= 12 ? multiply_block_tiles<element, 12>
                                    : multiply_block_tiles<element, 16>;
    some(from, steps, operands + row * x_stride, x_stride, count, out + row * out_stride, out_stride);
  }
}

}  // namespace
}  // namespace tokenswift
