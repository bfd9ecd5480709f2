// Some queries meet one page: scores, online softmax, weighted values.
//
// What is computed for a query does not depend on the queries beside it, and a page none of whose lanes it sees
// leaves its state as it is, bit for bit: the maximum stays, the rescaling factor is exactly 1, every weight exactly 0.
#pragma once

#include "dot.h"
#include "kernels.h"
#include "rowwise.h"

namespace tokenswift {
namespace {

constexpr int score_vectors = page_size / Isa::lanes;  // vectors that hold a score for every lane of a page
constexpr float hidden_score = -3e38f;                // stays below no_maximum when scaled, and finite

// A query's scores become its weights; updates its maximum and sums, writes the weights as operands, and returns the
// factor by which everything accumulated so far has to be scaled.
template <class Dot>
inline __attribute__((always_inline)) Vec softmax(const PageVisit& visit, int query, Vec (&s)[score_vectors],
                                                  typename Dot::Operand* weights) {
  float* sums = visit.state + size_t(query) * state_floats(visit.head_dim) + visit.head_dim;
  float* maximum = sums + sums_width;
  if (visit.first) {
    for (int j = 0; j < score_vectors; ++j) {
      s[j] = Isa::keep(s[j], Isa::splat(hidden_score), j * Isa::lanes, visit.first[query], visit.last[query]);
    }
  }
  Vec top = s[0];
  for (int j = 1; j < score_vectors; ++j) top = Isa::max(top, s[j]);
  const Vec scale = Isa::splat(visit.scale);
  const Vec old = Isa::splat(*maximum);
  const Vec now = Isa::max(old, Isa::mul(Isa::max_across(top), scale));
  const Vec rescale = exp2(Isa::sub(old, now));
  const Vec offset = Isa::sub(Isa::zero(), now);
  constexpr Precision precision = sizeof(typename Dot::Operand) == 2 ? Precision::short_ : Precision::full;
  for (int j = 0; j < score_vectors; ++j) s[j] = exp2<precision>(Isa::fma(s[j], scale, offset));
  Isa::store_first(maximum, now);
  for (int j = 0; j < score_vectors; ++j) Dot::round(s[j], weights + j * Isa::lanes);
  // Sum i of the 16 holds the weights of lanes i, i + 16, i + 32 and i + 48 of every page.
  constexpr int parts = sums_width / Isa::lanes;
  Vec page_sum = Isa::zero();
  for (int part = 0; part < parts; ++part) {
    Vec sum = s[part];
    for (int j = part + parts; j < score_vectors; j += parts) sum = Isa::add(sum, s[j]);
    Isa::store(sums + part * Isa::lanes, Isa::fma(Isa::load(sums + part * Isa::lanes), rescale, sum));
    page_sum = Isa::add(page_sum, sum);
  }
  if (visit.mass) {
    visit.mass[query * visit.mass_stride] = Isa::sum(page_sum);
    visit.mass_maximum[query * visit.mass_stride] = *maximum;
  }
  return rescale;
}

// The next page is asked for while this one is computed with. A visit of one or two tiles asks for all of it in each;
// one of many spreads it over four, a quarter each: else it would wait for memory in the first tile and leave memory
// idle in the others.
template <int V, bool spread>
constexpr int lines_ahead = V * Isa::lanes * int(sizeof(float)) / line_bytes / (spread ? 4 : 1);

template <bool spread>
uintptr_t quarter_ahead(const PageVisit& visit, const void* half, int query) {
  const size_t bytes = static_cast<const char*>(visit.values) - static_cast<const char*>(visit.keys);
  const int quarter = spread ? query / Isa::page_rows % 4 : 0;
  return reinterpret_cast<uintptr_t>(half) + visit.next + quarter * (bytes / 4);
}

template <class Dot, int M, bool spread>
inline __attribute__((always_inline)) void score(const PageVisit& visit, int query, Vec (&s)[M][score_vectors]) {
  constexpr int V = Isa::page_vectors;
  const auto* keys = static_cast<const typename Dot::Weight*>(visit.keys);
  const auto* q = static_cast<const typename Dot::Operand*>(visit.q) + size_t(query) * visit.head_dim;
  uintptr_t ahead = quarter_ahead<spread>(visit, keys, query);
  for (int block = 0; block < score_vectors; block += V) {
    Vec acc[M][V];
    each<M, V>([&](int i, int j) { acc[i][j] = Isa::zero(); });
    accumulate<Dot, M, V, lines_ahead<V, spread>>(acc, keys + block * Isa::lanes * Dot::step, page_size * Dot::step, q,
                                                  visit.head_dim, visit.head_dim / Dot::step, ahead);
    each<M, V>([&](int i, int j) { s[i][block + j] = acc[i][j]; });
  }
}

// V vectors of the values' columns from `column` on.
template <class Dot, int M, int V, bool spread>
inline __attribute__((always_inline)) void add_values(const PageVisit& visit, int query, int column,
                                                      const typename Dot::Operand* weights, const Vec (&rescale)[M],
                                                      uintptr_t& ahead) {
  const auto* values = static_cast<const typename Dot::Weight*>(visit.values) + column * Dot::step;
  const size_t stride = state_floats(visit.head_dim);
  float* state = visit.state + query * stride + column;
  Vec acc[M][V];
  each<M, V>([&](int i, int j) {
    acc[i][j] = Isa::mul(Isa::load(state + i * stride + j * Isa::lanes), rescale[i]);
  });
  accumulate<Dot, M, V, lines_ahead<V, spread>>(acc, values, visit.head_dim * Dot::step, weights, page_size,
                                                page_size / Dot::step, ahead);
  each<M, V>([&](int i, int j) { Isa::store(state + i * stride + j * Isa::lanes, acc[i][j]); });
}

template <class Dot, int M, bool spread>
void visit_tile(const PageVisit& visit, int query) {
  alignas(64) typename Dot::Operand weights[M][page_size];
  Vec s[M][score_vectors], rescale[M];
  score<Dot, M, spread>(visit, query, s);
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) rescale[i] = softmax<Dot>(visit, query + i, s[i], weights[i]);
  constexpr int block = Isa::page_vectors * Isa::lanes;
  uintptr_t ahead = quarter_ahead<spread>(visit, visit.values, query);
  int column = 0;
  for (; column + block <= visit.head_dim; column += block) {
    add_values<Dot, M, Isa::page_vectors, spread>(visit, query, column, weights[0], rescale, ahead);
  }
  for (; column < visit.head_dim; column += Isa::lanes) {
    add_values<Dot, M, 1, spread>(visit, query, column, weights[0], rescale, ahead);
  }
}

template <class Dot, int M, bool spread>
void visit_queries(int m, const PageVisit& visit, int query) {
  if (m == M) return visit_tile<Dot, M, spread>(visit, query);
  if constexpr (M > 1) visit_queries<Dot, M - 1, spread>(m, visit, query);
}

template <class Dot, bool spread>
void visit_tiles(const PageVisit& visit) {
  constexpr int tile = Isa::page_rows;
  for (int query = 0; query < visit.queries; query += tile) {
    visit_queries<Dot, tile, spread>(visit.queries - query < tile ? visit.queries - query : tile, visit, query);
  }
}

template <class Dot>
void visit_page(const PageVisit& visit) {
  if (lines_ahead<Isa::page_vectors, true> && visit.queries > 2 * Isa::page_rows) return visit_tiles<Dot, true>(visit);
  visit_tiles<Dot, false>(visit);
}

}  // namespace
}  // namespace tokenswift
