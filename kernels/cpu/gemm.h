// Rows of activations times one packed panel of weights, each output element summed in one fixed order over k.
#pragma once

#include "dot.h"

namespace tokenswift {
namespace {

// One row is bound by memory; its weights are asked for this far ahead, across the page borders at which the
// hardware prefetcher stops.
constexpr uintptr_t prefetch_bytes = 4096;

template <class Dot, int M>
void multiply_tile(const typename Dot::Weight* panel, int steps, const typename Dot::Operand* x, size_t x_stride,
                   float* out, size_t out_stride) {
  constexpr int V = Isa::gemm_vectors;
  Vec acc[M][V];
  each<M, V>([&](int i, int j) { acc[i][j] = Isa::zero(); });
  constexpr int lines = V * Isa::lanes * int(sizeof(float)) / line_bytes;
  uintptr_t ahead = reinterpret_cast<uintptr_t>(panel) + prefetch_bytes;
  accumulate<Dot, M, V, lines>(acc, panel, V * Isa::lanes * Dot::step, x, x_stride, steps, ahead);
  each<M, V>([&](int i, int j) { Isa::store(out + i * out_stride + j * Isa::lanes, acc[i][j]); });
}

template <class Dot, int M>
void multiply_rows(int m, const typename Dot::Weight* panel, int steps, const typename Dot::Operand* x,
                   size_t x_stride, float* out, size_t out_stride) {
  if (m == M) return multiply_tile<Dot, M>(panel, steps, x, x_stride, out, out_stride);
  if constexpr (M > 1) multiply_rows<Dot, M - 1>(m, panel, steps, x, x_stride, out, out_stride);
}

template <class Dot>
void multiply(const void* panel, int steps, const void* x, size_t x_stride, int rows, float* out, size_t out_stride) {
  constexpr int tile = Isa::gemm_rows;
  for (int row = 0; row < rows; row += tile) {
    multiply_rows<Dot, tile>(rows - row < tile ? rows - row : tile, static_cast<const typename Dot::Weight*>(panel),
                             steps, static_cast<const typename Dot::Operand*>(x) + row * x_stride, x_stride,
                             out + row * out_stride, out_stride);
  }
}

template <class Dot>
void round_operands(const float* x, int n, void* out) {
  Dot::round(x, n, static_cast<typename Dot::Operand*>(out));
}

}  // namespace
}  // namespace tokenswift
