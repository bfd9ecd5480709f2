// Some queries meet one page: scores, online softmax, weighted values.
//
// What is computed for a query does not depend on the queries beside it, and a page none of whose lanes it sees
// leaves its state as it is, bit for bit: the maximum stays, the rescaling factor is exactly 1, every weight exactly 0.
#pragma once

#include <cmath>

#include "dot.h"
#include "kernels.h"
#include "rowwise.h"

namespace tokenswift {
namespace {

// Turns 64 scores into weights in place, updates the query's maximum and sums, and returns the factor by which
// everything accumulated so far has to be scaled.
inline Vec softmax_query(const PageVisit& visit, int query, float* scores) {
  constexpr int vectors = page_size / Isa::lanes;
  const int head_dim = visit.head_dim;
  float* state = visit.state + size_t(query) * state_floats(head_dim);
  Vec s[vectors];
  for (int j = 0; j < vectors; ++j) s[j] = Isa::load(scores + j * Isa::lanes);
  if (visit.first) {
    const Vec hidden = Isa::splat(-INFINITY);
    for (int j = 0; j < vectors; ++j) {
      s[j] = Isa::keep(s[j], hidden, j * Isa::lanes, visit.first[query], visit.last[query]);
    }
  }
  Vec top = s[0];
  for (int j = 1; j < vectors; ++j) top = Isa::max(top, s[j]);
  const Vec scale = Isa::splat(visit.scale);
  const Vec old = Isa::splat(state[state_maximum(head_dim)]);
  const Vec maximum = Isa::max(old, Isa::mul(Isa::max_across(top), scale));
  const Vec rescale = exp2(Isa::sub(old, maximum));
  const Vec offset = Isa::sub(Isa::zero(), maximum);
  for (int j = 0; j < vectors; ++j) {
    s[j] = exp2(Isa::fma(s[j], scale, offset));
    Isa::store(scores + j * Isa::lanes, s[j]);
  }
  // 16 partial sums: lane i holds the weights of lanes i, i + 16, i + 32, i + 48 of every page.
  constexpr int parts = sums_width / Isa::lanes;
  Vec page_sum = Isa::zero();
  for (int part = 0; part < parts; ++part) {
    Vec sum = s[part];
    for (int j = part + parts; j < vectors; j += parts) sum = Isa::add(sum, s[j]);
    float* total = state + head_dim + part * Isa::lanes;
    Isa::store(total, Isa::fma(Isa::load(total), rescale, sum));
    page_sum = Isa::add(page_sum, sum);
  }
  alignas(64) float maxima[Isa::lanes];
  Isa::store(maxima, maximum);
  state[state_maximum(head_dim)] = maxima[0];
  if (visit.mass) {
    visit.mass[query * visit.mass_stride] = Isa::sum(page_sum);
    visit.mass_maximum[query * visit.mass_stride] = maxima[0];
  }
  return rescale;
}

template <class Dot, int M>
inline void scores_of(const PageVisit& visit, int query, float* scores) {
  constexpr int V = Isa::page_vectors;
  const auto* keys = static_cast<const typename Dot::Weight*>(visit.keys);
  const auto* q = static_cast<const typename Dot::Operand*>(visit.q) + size_t(query) * visit.head_dim;
  for (int lane = 0; lane < page_size; lane += V * Isa::lanes) {
    Vec acc[M][V];
    each<M, V>([&](int i, int j) { acc[i][j] = Isa::zero(); });
    accumulate<Dot, M, V>(acc, keys + lane * Dot::step, page_size * Dot::step, q, visit.head_dim,
                          visit.head_dim / Dot::step, visit.next);
    each<M, V>([&](int i, int j) { Isa::store(scores + i * page_size + lane + j * Isa::lanes, acc[i][j]); });
  }
}

// V vectors of the values' columns from `column` on.
template <class Dot, int M, int V>
inline void add_values(const PageVisit& visit, int query, int column, const typename Dot::Operand* weights,
                       const Vec (&rescale)[M]) {
  const auto* values = static_cast<const typename Dot::Weight*>(visit.values) + column * Dot::step;
  float* state = visit.state + size_t(query) * state_floats(visit.head_dim) + column;
  const size_t stride = state_floats(visit.head_dim);
  Vec acc[M][V];
  each<M, V>([&](int i, int j) {
    acc[i][j] = Isa::mul(Isa::load(state + i * stride + j * Isa::lanes), rescale[i]);
  });
  accumulate<Dot, M, V>(acc, values, visit.head_dim * Dot::step, weights, page_size, page_size / Dot::step, visit.next);
  each<M, V>([&](int i, int j) { Isa::store(state + i * stride + j * Isa::lanes, acc[i][j]); });
}

template <class Dot, int M>
void visit_tile(const PageVisit& visit, int query) {
  alignas(64) float scores[M * page_size];
  alignas(64) typename Dot::Operand weights[M * page_size];
  scores_of<Dot, M>(visit, query, scores);
  Vec rescale[M];
  for (int i = 0; i < M; ++i) rescale[i] = softmax_query(visit, query + i, scores + i * page_size);
  Dot::round(scores, M * page_size, weights);
  constexpr int block = Isa::page_vectors * Isa::lanes;
  int column = 0;
  for (; column + block <= visit.head_dim; column += block) {
    add_values<Dot, M, Isa::page_vectors>(visit, query, column, weights, rescale);
  }
  for (; column < visit.head_dim; column += Isa::lanes) {
    add_values<Dot, M, 1>(visit, query, column, weights, rescale);
  }
}

template <class Dot, int M>
void visit_queries(int m, const PageVisit& visit, int query) {
  if (m == M) return visit_tile<Dot, M>(visit, query);
  if constexpr (M > 1) visit_queries<Dot, M - 1>(m, visit, query);
}

template <class Dot>
void visit_page(const PageVisit& visit) {
  constexpr int tile = Isa::page_rows;
  for (int query = 0; query < visit.queries; query += tile) {
    visit_queries<Dot, tile>(visit.queries - query < tile ? visit.queries - query : tile, visit, query);
  }
}

}  // namespace
}  // namespace tokenswift
