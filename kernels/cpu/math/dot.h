// How an element type is multiplied and summed on one ISA. Each policy fixes one order. An output element is
// acc = acc + w[k] x[k] for k = 0, 1, 2, ... in one chain, whatever else is computed beside it.
//
//   Weight   type of the weights in memory, packed as [steps][columns][step]
//   Operand  type that the other factor (activations, queries, probabilities) is rounded to
//   Columns  one vector of weights, loaded once and used for every row of a tile
#pragma once

#include <cstdint>
#include <cstring>

#include "isa/vec.h"

namespace tokenswift {
namespace {

using Vec = Isa::Vec;

constexpr int line_bytes = 64;  // bytes of a line of the cache

struct F32Dot {
  using Weight = float;
  using Operand = float;
  using Columns = Vec;
  static constexpr int step = 1;

  static Columns columns(const Weight* w) { return Isa::load(w); }
  static Vec add(Vec acc, Columns w, const Operand* x) { return Isa::fma(w, Isa::splat(*x), acc); }
  static void round(const float* x, int n, Operand* out) { std::memcpy(out, x, n * sizeof *x); }
  static void round(Vec x, Operand* out) { Isa::store(out, x); }
};

// The weights are bf16 and widened exactly. Operands stay fp32.
struct WidenedBf16Dot {
  using Weight = uint16_t;
  using Operand = float;
  struct Columns {
    Vec even, odd;
  };
  static constexpr int step = 2;

  static Columns columns(const Weight* w) { return {Isa::widen_even(w), Isa::widen_odd(w)}; }
  static Vec add(Vec acc, Columns w, const Operand* x) {
    acc = Isa::fma(w.even, Isa::splat(x[0]), acc);
    return Isa::fma(w.odd, Isa::splat(x[1]), acc);
  }
  static void round(const float* x, int n, Operand* out) { std::memcpy(out, x, n * sizeof *x); }
  static void round(Vec x, Operand* out) { Isa::store(out, x); }
};

#ifdef __AVX512BF16__
// An instruction computes two products a lane. Operands are rounded to the nearest bf16, ties to even.
struct NativeBf16Dot {
  using Weight = uint16_t;
  using Operand = uint16_t;
  using Columns = __m512bh;
  static constexpr int step = 2;

  static Columns columns(const Weight* w) { return (__m512bh)_mm512_loadu_si512(w); }
  static Vec add(Vec acc, Columns w, const Operand* x) {
    int pair;
    std::memcpy(&pair, x, sizeof pair);
    return _mm512_dpbf16_ps(acc, w, (__m512bh)_mm512_set1_epi32(pair));
  }
  // n: a multiple of 16.
  static void round(const float* x, int n, Operand* out) {
    for (int i = 0; i < n; i += Isa::lanes) {
      round(Isa::load(x + i), out + i);
    }
  }
  static void round(Vec x, Operand* out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(x));
  }
};
using Bf16Dot = NativeBf16Dot;
#else
using Bf16Dot = WidenedBf16Dot;
#endif

// Calls f(i, j) for every register of a tile. The loops are unrolled, so that the tile stays in registers.
template <int M, int V, class F>
inline __attribute__((always_inline)) void each(F f) {
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) f(i, j);
}

// acc[i][j] += the product of row i of x and vector j of the columns, over all steps in order. Each step prefetches
// `lines` cache lines from `ahead` on. Every third row has an address in a register, and x86 reaches three rows with it
// (base, base + s, base + 2 s).
template <class Dot, int M, int V, int lines, class W>
inline __attribute__((always_inline)) void accumulate(Vec (&acc)[M][V], const W* w, size_t w_stride,
                                                      const typename Dot::Operand* x, size_t x_stride, int steps,
                                                      uintptr_t& ahead) {
  const typename Dot::Operand* base[(M + 2) / 3];
#pragma GCC unroll 4
  for (int i = 0; i < M; i += 3) base[i / 3] = x + i * x_stride;
  for (int k = 0; k < steps; ++k) {
    typename Dot::Columns columns[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) columns[j] = Dot::columns(w + j * Isa::lanes * Dot::step);
#pragma GCC unroll 4
    for (int j = 0; j < lines; ++j) Isa::prefetch(reinterpret_cast<const void*>(ahead + j * line_bytes));
    ahead += lines * line_bytes;
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const typename Dot::Operand* row = base[i / 3] + (i % 3) * x_stride;
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) acc[i][j] = Dot::add(acc[i][j], columns[j], row);
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; i += 3) base[i / 3] += Dot::step;
    w += w_stride;
  }
}

}  // namespace
}  // namespace tokenswift
