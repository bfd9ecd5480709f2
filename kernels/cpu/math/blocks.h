// Rows of activations times one packed panel of block-quantised weights (quant.h).
#pragma once

#include "math/gemm.h"
#include "math/quant.h"

namespace tokenswift {
namespace {

constexpr int gemm_columns = Isa::gemm_vectors * Isa::lanes;

struct Q8 {
  static constexpr size_t bytes = q8_block_bytes(gemm_columns);
  static constexpr bool has_minimum = false;
  static constexpr int zero = 128;  // the quant that stands for 0

  // Four k of one vector of columns; group = 4 * half + g.
  static Isa::Bytes load(const uint8_t* quants, int half, int g, int j) {
    return Isa::load_bytes(quants + ((4 * half + g) * gemm_columns + j * Isa::lanes) * 4);
  }
};

struct Q4 {
  static constexpr size_t bytes = q4_block_bytes(gemm_columns);
  static constexpr bool has_minimum = true;
  static constexpr int zero = 0;

  static Isa::Bytes load(const uint8_t* quants, int half, int g, int j) {
    const Isa::Bytes both = Isa::load_bytes(quants + (g * gemm_columns + j * Isa::lanes) * 4);
    return half ? Isa::high_halves(both) : Isa::low_halves(both);
  }
};

template <class Kind, int M>
void multiply_blocks(const char* panel, int blocks, const ActivationBlock* x, size_t x_stride, float* out,
                     size_t out_stride) {
  constexpr int V = Isa::gemm_vectors;
  Vec acc[M][V];
  each<M, V>([&](int i, int j) { acc[i][j] = Isa::zero(); });
  for (int block = 0; block < blocks; ++block, panel += Kind::bytes, ++x) {
    const auto* d = reinterpret_cast<const uint16_t*>(panel);
    const auto* quants = reinterpret_cast<const uint8_t*>(d + (Kind::has_minimum ? 2 : 1) * gemm_columns);
#pragma GCC unroll 32
    for (size_t at = 0; at < Kind::bytes; at += line_bytes) Isa::prefetch(panel + prefetch_bytes + at);
    Isa::Wholes sums[M][V];
    each<M, V>([&](int i, int j) { sums[i][j] = Isa::wholes(-Kind::zero * x[i * x_stride].sum); });
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) {
        Isa::Unsigned quads[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) quads[j] = Isa::unsigned_bytes(Kind::load(quants, half, g, j));
#pragma GCC unroll 12
        for (int i = 0; i < M; ++i) {
          const Isa::Signed factors = Isa::signed_bytes(Isa::repeat(x[i * x_stride].quants + (4 * half + g) * 4));
#pragma GCC unroll 4
          for (int j = 0; j < V; ++j) sums[i][j] = Isa::dot(sums[i][j], quads[j], factors);
        }
      }
    }
    each<M, V>([&](int i, int j) {
      const ActivationBlock& row = x[i * x_stride];
      const Vec scale = Isa::mul(Isa::load_halfs(d + j * Isa::lanes), Isa::splat(row.scale));
      acc[i][j] = Isa::fma(scale, Isa::to_floats(sums[i][j]), acc[i][j]);
      if constexpr (Kind::has_minimum) {
        const Vec minimum = Isa::load_halfs(d + gemm_columns + j * Isa::lanes);
        acc[i][j] = Isa::fma(minimum, Isa::splat(row.scaled_sum), acc[i][j]);
      }
    });
  }
  each<M, V>([&](int i, int j) { Isa::store(out + i * out_stride + j * Isa::lanes, acc[i][j]); });
}

template <class Kind>
struct Blocks {
  using Operand = ActivationBlock;
  static constexpr int operand_bytes = activation_bytes, values_an_operand = block_size;
  static constexpr int rows = Isa::block_rows;

  template <int M>
  static void tile(const void* panel, int blocks, const Operand* x, size_t x_stride, float* out, size_t out_stride) {
    multiply_blocks<Kind, M>(static_cast<const char*>(panel), blocks, x, x_stride, out, out_stride);
  }

  static void round(const float* x, int n, Operand* out) { quantise_row(x, n, out); }
};

}  // namespace
}  // namespace tokenswift
