// The work when some queries meet a page of bytes. Only drafts read such pages, so rounding may be coarse here. But a
// query's result does not depend on the queries beside it here either.
//
//   keys    [head_dim / 4][64][4]    unsigned bytes: quant + 128
//   values  [16][head_dim][4]        signed bytes of four tokens
//   scales  [64] of keys, [64] of values, fp32
//
// Queries are rounded as activations are (quant.h). Weights are rounded to unsigned bytes, with one scale for each
// query and page.
#pragma once

#include "math/page.h"
#include "math/quant.h"

namespace tokenswift {
namespace {

struct BytePage {
  struct Weights {
    uint8_t quants[page_size];
    float scale;
  };
  using Copied = BytePage;
  static constexpr bool scaled = true, capped = false;
  static constexpr Precision precision = Precision::short_;
  static constexpr int zero = 128;  // the byte of a key that stands for 0
  static constexpr int rows = 3;    // rows of a tile: registers hold two sums of each beside the bytes

  static size_t half_bytes(const PageVisit& visit) { return size_t(page_size) * visit.head_dim; }
  static const uint8_t* keys(const PageVisit& visit) { return reinterpret_cast<const uint8_t*>(visit.block); }
  static const uint8_t* values(const PageVisit& visit) { return keys(visit) + half_bytes(visit); }
  static const float* key_scales(const PageVisit& visit) {
    return reinterpret_cast<const float*>(visit.block + 2 * half_bytes(visit));
  }
  static const float* value_scales(const PageVisit& visit) { return key_scales(visit) + page_size; }

  static int query_blocks(const PageVisit& visit) { return (visit.head_dim + block_size - 1) / block_size; }

  // Rounds a query's weights. A weight that is NaN, because a value's scale is, counts as zero.
  static void round(Vec (&s)[page_size / Isa::lanes], Weights& out) {
    Vec top = Isa::zero();
    for (Vec& weights : s) {
      weights = Isa::max(weights, Isa::zero());
      top = Isa::max(top, weights);
    }
    Isa::store_first(&out.scale, Isa::max_across(top));
    const Vec inverse = Isa::splat(out.scale > 1e-30f ? 255.0f / out.scale : 0.0f);
    for (int j = 0; j < page_size / Isa::lanes; ++j) {
      Isa::store_bytes(out.quants + j * Isa::lanes, Isa::max(Isa::mul(s[j], inverse), Isa::zero()));
    }
    out.scale /= 255.0f;
  }
};

// The products of bytes of keys with a query, and of values with weights. Each has an unsigned and a signed factor.
struct KeyProducts {
  static Isa::Unsigned columns(Isa::Bytes bytes) { return Isa::unsigned_bytes(bytes); }
  static Isa::Signed factors(const int8_t* four) { return Isa::signed_bytes(Isa::repeat(four)); }
  static Isa::Wholes add(Isa::Wholes sum, Isa::Unsigned columns, Isa::Signed factors) {
    return Isa::dot(sum, columns, factors);
  }
};
struct ValueProducts {
  static Isa::Signed columns(Isa::Bytes bytes) { return Isa::signed_bytes(bytes); }
  static Isa::Unsigned factors(const uint8_t* four) { return Isa::unsigned_bytes(Isa::repeat(four)); }
  static Isa::Wholes add(Isa::Wholes sum, Isa::Signed columns, Isa::Unsigned factors) {
    return Isa::dot(sum, factors, columns);
  }
};

// sums[i][j] += the products of the bytes of vector j of the columns with the factors of row i, four in each of `steps`
// steps. The first tile prefetches the next page. Each step asks for half as many bytes as it reads, in whole lines,
// and the rest is asked for between scores and values. A core cannot wait for all lines at once, and memory would be
// idle while weights are computed.
constexpr int lines_a_step(int vectors) { return vectors * Isa::lanes * 4 / line_bytes / 2; }

template <class Products, bool first, int M, int V, class FactorsOf>
inline __attribute__((always_inline)) void add_products(Isa::Wholes (&sums)[M][V], const uint8_t* columns,
                                                        size_t stride, int steps, uintptr_t& ahead,
                                                        const FactorsOf& factors_of) {
  constexpr int lines = lines_a_step(V);
  for (int step = 0; step < steps; ++step, columns += stride) {
    decltype(Products::columns(Isa::Bytes{})) vectors[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) vectors[j] = Products::columns(Isa::load_bytes(columns + j * Isa::lanes * 4));
#pragma GCC unroll 4
    for (int j = 0; first && j < lines; ++j) Isa::prefetch(reinterpret_cast<const void*>(ahead + j * line_bytes));
    ahead += lines * line_bytes;
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      const auto factors = Products::factors(factors_of(i) + 4 * step);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sums[i][j] = Products::add(sums[i][j], vectors[j], factors);
    }
  }
}

template <int M, bool first>
inline __attribute__((always_inline)) void score_bytes(const PageVisit& visit, int query, uintptr_t& ahead,
                                                       Vec (&s)[M][score_vectors]) {
  constexpr int V = Isa::page_vectors;
  const int blocks = BytePage::query_blocks(visit);
  const auto* q = static_cast<const ActivationBlock*>(visit.q) + size_t(query) * blocks;
  for (int vector = 0; vector < score_vectors; vector += V) {
    Vec acc[M][V];
    each<M, V>([&](int i, int j) { acc[i][j] = Isa::zero(); });
    const uint8_t* columns = BytePage::keys(visit) + vector * Isa::lanes * 4;
    for (int block = 0; block < blocks; ++block, columns += block_size * page_size) {
      const ActivationBlock* part = q + block;
      const int rest = visit.head_dim - block * block_size;
      Isa::Wholes sums[M][V];
      each<M, V>([&](int i, int j) { sums[i][j] = Isa::wholes(-BytePage::zero * part[i * blocks].sum); });
      const int steps = (rest < block_size ? rest : block_size) / 4;
      add_products<KeyProducts, first>(sums, columns, page_size * 4, steps, ahead,
                                       [&](int i) { return part[i * blocks].quants; });
      each<M, V>([&](int i, int j) {
        acc[i][j] = Isa::fma(Isa::splat(part[i * blocks].scale), Isa::to_floats(sums[i][j]), acc[i][j]);
      });
    }
    each<M, V>([&](int i, int j) { s[i][vector + j] = acc[i][j]; });
  }
}

// Adds the weighted values to the states, in V vectors of columns from `column` on.
template <int M, int V, bool first>
inline __attribute__((always_inline)) void add_byte_values(const PageVisit& visit, int query, int column,
                                                           const BytePage::Weights (&weights)[M],
                                                           const Vec (&rescale)[M], uintptr_t& ahead) {
  Isa::Wholes sums[M][V];
  each<M, V>([&](int i, int j) { sums[i][j] = Isa::wholes(0); });
  const uint8_t* columns = BytePage::values(visit) + column * 4;
  add_products<ValueProducts, first>(sums, columns, size_t(visit.head_dim) * 4, page_size / 4, ahead,
                                     [&](int i) { return weights[i].quants; });
  const size_t stride = state_floats(visit.head_dim);
  float* state = visit.state + query * stride + column;
  each<M, V>([&](int i, int j) {
    float* at = state + i * stride + j * Isa::lanes;
    const Vec kept = Isa::mul(Isa::load(at), rescale[i]);
    Isa::store(at, Isa::fma(Isa::splat(weights[i].scale), Isa::to_floats(sums[i][j]), kept));
  });
}

// Returns how many lines of a page no step asks for.
inline int lines_between(int head_dim) {
  constexpr int V = Isa::page_vectors, width = V * Isa::lanes;
  const int keys = head_dim / 4 * (score_vectors / V) * lines_a_step(V);
  const int columns = head_dim / width * lines_a_step(V) + head_dim % width / Isa::lanes * lines_a_step(1);
  const int page = (page_size * head_dim + page_size * int(sizeof(float))) * 2 / line_bytes;
  return page - keys - page_size / 4 * columns;
}

template <class Page, int M, bool first>
void visit_byte_tile(const PageVisit& visit, int query) {
  alignas(64) BytePage::Weights weights[M];
  Vec s[M][score_vectors], rescale[M];
  uintptr_t ahead = reinterpret_cast<uintptr_t>(visit.next);
  score_bytes<M, first>(visit, query, ahead, s);
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
    const int lines = first ? (lines_between(visit.head_dim) + M - 1) / M : 0;
    for (int j = 0; j < lines; ++j, ahead += line_bytes) Isa::prefetch(reinterpret_cast<const void*>(ahead));
    rescale[i] = softmax<Page>(visit, query + i, s[i], weights[i]);
  }
  constexpr int block = Isa::page_vectors * Isa::lanes;
  int column = 0;
  for (; column + block <= visit.head_dim; column += block) {
    add_byte_values<M, Isa::page_vectors, first>(visit, query, column, weights, rescale, ahead);
  }
  for (; column < visit.head_dim; column += Isa::lanes) {
    add_byte_values<M, 1, first>(visit, query, column, weights, rescale, ahead);
  }
}

template <class Page, bool first>
void visit_byte_queries(const PageVisit& visit, int query) {
  switch (visit.queries - query) {
    case 1:
      return visit_byte_tile<Page, 1, first>(visit, query);
    case 2:
      return visit_byte_tile<Page, 2, first>(visit, query);
    default:
      return visit_byte_tile<Page, BytePage::rows, first>(visit, query);
  }
}

template <class Page>
void visit_byte_page(const PageVisit& visit) {
  visit_byte_queries<Page, true>(visit, 0);
  for (int query = BytePage::rows; query < visit.queries; query += BytePage::rows) {
    visit_byte_queries<Page, false>(visit, query);
  }
}

inline void visit_bytes(const PageVisit& visit) {
  visit.cap > 0 ? visit_byte_page<Capped<BytePage>>(visit) : visit_byte_page<BytePage>(visit);
}

inline void round_query(const float* x, int n, void* out) { quantise_row(x, n, static_cast<ActivationBlock*>(out)); }

}  // namespace
}  // namespace tokenswift
