// The products of rows of activations with one packed panel of weights. Each output element is summed over k in one
// fixed order.
#pragma once

#include "isa/kernels.h"
#include "math/dot.h"

namespace tokenswift {
namespace {

// How far ahead weights are prefetched. A pass of one row waits for memory, and the hardware prefetcher stops at the
// borders of memory pages.
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

// A format of weights for multiply(). Its values are multiplied as they lie in memory.
template <class Dot>
struct Values {
  using Operand = typename Dot::Operand;
  static constexpr int operand_bytes = sizeof(Operand), values_an_operand = 1;
  static constexpr int rows = Isa::gemm_rows;

  template <int M>
  static void tile(const void* panel, int steps, const Operand* x, size_t x_stride, float* out, size_t out_stride) {
    multiply_tile<Dot, M>(static_cast<const typename Dot::Weight*>(panel), steps, x, x_stride, out, out_stride);
  }

  static void round(const float* x, int n, Operand* out) { Dot::round(x, round_up(n, vector_multiple), out); }
};

template <class Format, int M>
void multiply_rows(int m, const void* panel, int steps, const typename Format::Operand* x, size_t x_stride, float* out,
                   size_t out_stride) {
  if (m == M) return Format::template tile<M>(panel, steps, x, x_stride, out, out_stride);
  if constexpr (M > 1) multiply_rows<Format, M - 1>(m, panel, steps, x, x_stride, out, out_stride);
}

template <class Format>
void multiply(const void* panel, int steps, const void* x, size_t x_stride, int rows, float* out, size_t out_stride) {
  const auto* operands = static_cast<const typename Format::Operand*>(x);
  x_stride /= Format::values_an_operand;
  for (int row = 0; row < rows; row += Format::rows) {
    const int count = rows - row < Format::rows ? rows - row : Format::rows;
    multiply_rows<Format, Format::rows>(count, panel, steps, operands + row * x_stride, x_stride,
                                        out + row * out_stride, out_stride);
  }
}

template <class Format>
void round_operands(const float* x, int n, void* out) {
  Format::round(x, n, static_cast<typename Format::Operand*>(out));
}

}  // namespace
}  // namespace tokenswift
