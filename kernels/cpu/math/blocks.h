// The products of rows of activations with one packed panel of block-quantised weights (formats.h, quant.h).
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "math/gemm.h"
#include "math/quant.h"

namespace tokenswift {
namespace {

constexpr int gemm_columns = Isa::gemm_vectors * Isa::lanes;

// How products of bytes are summed, for weights of more than 6 bits or of a codebook. A Sum takes `groups` of four
// products each. It goes on from the sum of the groups before.
struct ByteDot {
  using Unsigned = Isa::Unsigned;
  using Signed = Isa::Signed;
  using Sum = Isa::Wholes;
  static constexpr int groups(int) { return 8; }
  static Unsigned unsigned_bytes(Isa::Bytes a) { return Isa::unsigned_bytes(a); }
  static Signed signed_bytes(Isa::Bytes a) { return Isa::signed_bytes(a); }
  static Sum begin(Isa::Wholes before) { return before; }
  static Sum add(Sum sum, const Unsigned& w, const Signed& x) { return Isa::dot(sum, w, x); }
  static Isa::Wholes end(Isa::Wholes, Sum sum) { return sum; }
};

// How products of bytes are summed for weights of up to 6 bits. A Sum begins at zero, in 16 bits where these are
// faster, and is added to the sum of the groups before.
struct ShortDot {
  using Unsigned = Isa::Bytes;
  using Signed = Isa::Bytes;
  using Sum = Isa::Shorts;
  static constexpr int groups(int bits) { return Isa::short_dots(bits); }
  static Unsigned unsigned_bytes(Isa::Bytes a) { return a; }
  static Signed signed_bytes(Isa::Bytes a) { return a; }
  static Sum begin(Isa::Wholes) { return Isa::shorts(); }
  static Sum add(Sum sum, Unsigned w, Signed x) { return Isa::short_dot(sum, w, x); }
  static Isa::Wholes end(Isa::Wholes before, Sum sum) { return Isa::add_shorts(before, sum); }
};

// A block of 32 weights of each column of a panel. It begins at its s.
template <Element element>
struct PackedBlock {
  static constexpr BlockFormat format = format_of(element);
  static constexpr int bytes = gemm_columns * (format.scale_bytes() + 4 * format.bits);
  static constexpr int parts = format.scales == 2 ? 2 : 1;  // that are summed one by one
  using Dot = std::conditional_t < format.bits<8 && !format.codebook, ShortDot, ByteDot>;

  const uint8_t* at;

  Isa::Bytes word(int index, int j) const {
    const int first = format.scale_bytes() + 4 * index;
    return Isa::load_bytes(at + first * gemm_columns + j * Isa::lanes * 4);
  }

  // Returns the quants k = 4 g .. 4 g + 3 of one vector of columns.
  template <int g>
  Isa::Bytes quants(int j) const {
    if constexpr (format.bits == 8) {
      return word(g, j);
    } else {
      const Isa::Bytes low = Isa::bits < g<4 ? 0 : -4, 15>(word(g % 4, j));
      if constexpr (format.codebook) return Isa::look_up(iq4_codebook, low);
      if constexpr (format.bits == 4) return low;
      constexpr int mask = (1 << format.bits) - 16;
      return Isa::either(low, Isa::bits<4 - high_shift(format.bits, g), mask>(word(high_word(format.bits, g), j)));
    }
  }

  // Returns the s of a part as floats, or t where index = scales.
  Vec whole(int index, int j) const {
    return Isa::widen(reinterpret_cast<const int8_t*>(at) + index * gemm_columns + j * Isa::lanes);
  }
};

// Calls f(i) for i = first .. first + count - 1, where i is a constant of the compiler.
template <int first, int count, class F, int... i>
inline __attribute__((always_inline)) void each_of(F f, std::integer_sequence<int, i...>) {
  (f(std::integral_constant<int, first + i>{}), ...);
}
template <int first, int count, class F>
inline __attribute__((always_inline)) void each_of(F f) {
  each_of<first, count>(f, std::make_integer_sequence<int, count>{});
}

// sums[i][j] += the quants of part `part` times those of row i. Rows are `x_stride` blocks apart.
template <class Block, int part, int M, int V>
inline __attribute__((always_inline)) void sum_part(Isa::Wholes (&sums)[M][V], const Block& block,
                                                    const ActivationBlock* x, size_t x_stride) {
  using Dot = typename Block::Dot;
  constexpr int groups = 8 / Block::parts, together = std::min(groups, Dot::groups(Block::format.bits));
  each_of<0, groups / together>([&](auto run) __attribute__((always_inline)) {
    typename Dot::Sum some[M][V];
    each<M, V>([&](int i, int j) { some[i][j] = Dot::begin(sums[i][j]); });
    each_of<part * groups + run * together, together>([&](auto g) __attribute__((always_inline)) {
      typename Dot::Unsigned quads[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) quads[j] = Dot::unsigned_bytes(block.template quants<g>(j));
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i) {
        const typename Dot::Signed factors = Dot::signed_bytes(Isa::repeat(x[i * x_stride].quants + g * 4));
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) some[i][j] = Dot::add(some[i][j], quads[j], factors);
      }
    });
    each<M, V>([&](int i, int j) { sums[i][j] = Dot::end(sums[i][j], some[i][j]); });
  });
}

// Adds the products of one part of a block to acc[i][j], by the formula of quant.h.
template <class Block, int part, int M, int V>
inline __attribute__((always_inline)) void add_part(Vec (&acc)[M][V], const Block& block, const uint16_t* halves,
                                                    const ActivationBlock* x, size_t x_stride) {
  constexpr BlockFormat format = Block::format;
  Isa::Wholes sums[M][V];
  each<M, V>([&](int i, int j) {
    const ActivationBlock& row = x[i * x_stride];
    const int32_t sum = Block::parts == 1 ? row.sum : part == 0 ? row.first_sum : row.sum - row.first_sum;
    sums[i][j] = Isa::wholes(-format.zero * sum);
  });
  sum_part<Block, part>(sums, block, x, x_stride);
  each<M, V>([&](int i, int j) {
    const ActivationBlock& row = x[i * x_stride];
    Vec d = Isa::load_halfs(halves + j * Isa::lanes);
    if constexpr (format.scales > 0) d = Isa::mul(d, block.whole(part, j));
    acc[i][j] = Isa::fma(Isa::mul(d, Isa::splat(row.scale)), Isa::to_floats(sums[i][j]), acc[i][j]);
    if constexpr (format.minimum) {
      Vec minimum = Isa::load_halfs(halves + gemm_columns + j * Isa::lanes);
      if constexpr (format.scales > 0) minimum = Isa::mul(minimum, block.whole(format.scales, j));
      acc[i][j] = Isa::fma(minimum, Isa::splat(row.scaled_sum), acc[i][j]);
    }
  });
}

template <Element element, int M>
void multiply_blocks(const char* panel, int steps, const ActivationBlock* x, size_t x_stride, float* out,
                     size_t out_stride) {
  using Block = PackedBlock<element>;
  constexpr BlockFormat format = Block::format;
  constexpr int V = Isa::gemm_vectors;
  Vec acc[M][V];
  each<M, V>([&](int i, int j) { acc[i][j] = Isa::zero(); });
  for (int step = 0; step < steps; ++step) {
    const auto* halves = reinterpret_cast<const uint16_t*>(panel);
    panel += format.halves() * 2 * gemm_columns;
    for (int i = 0; i < format.blocks(); ++i, panel += Block::bytes, ++x) {
#pragma GCC unroll 32
      for (int at = 0; at < Block::bytes; at += line_bytes) Isa::prefetch(panel + prefetch_bytes + at);
      const Block block{reinterpret_cast<const uint8_t*>(panel)};
      add_part<Block, 0>(acc, block, halves, x, x_stride);
      if constexpr (Block::parts == 2) add_part<Block, 1>(acc, block, halves, x, x_stride);
    }
  }
  each<M, V>([&](int i, int j) { Isa::store(out + i * out_stride + j * Isa::lanes, acc[i][j]); });
}

template <Element element>
struct Blocks {
  using Operand = ActivationBlock;
  static constexpr int operand_bytes = activation_bytes, values_an_operand = block_size;
  static constexpr int rows = Isa::block_rows;

  template <int M>
  static void tile(const void* panel, int steps, const Operand* x, size_t x_stride, float* out, size_t out_stride) {
    multiply_blocks<element, M>(static_cast<const char*>(panel), steps, x, x_stride, out, out_stride);
  }

  static void round(const float* x, int n, Operand* out) { quantise_row(x, n, out); }
};

}  // namespace
}  // namespace tokenswift
