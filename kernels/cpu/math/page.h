// The work when some queries meet one page: scores, online softmax, weighted values.
//
// A query's result does not depend on the queries beside it. A page none of whose lanes a query sees leaves its state
// as it is, bit for bit: the maximum stays, the rescaling factor is exactly 1, and every weight is exactly 0.
#pragma once

#include "isa/kernels.h"
#include "math/dot.h"
#include "math/rowwise.h"

namespace tokenswift {
namespace {

// A page whose elements are of the type that Dot multiplies with.
template <class D>
struct PageOf {
  using Dot = D;
  using Operand = typename D::Operand;
  using Weights = Operand[page_size];
  using Element = typename D::Weight;
  static constexpr bool scaled = false, capped = false;
  static constexpr Precision precision = sizeof(Operand) == 2 ? Precision::short_ : Precision::full;

  static size_t half(const PageVisit& visit) { return size_t(page_size) * visit.head_dim; }
  static size_t half_bytes(const PageVisit& visit) { return half(visit) * sizeof(Element); }
  static const Element* keys(const PageVisit& visit) { return reinterpret_cast<const Element*>(visit.block); }
  static const Element* values(const PageVisit& visit) { return keys(visit) + half(visit); }

  static void round(const Vec (&s)[page_size / Isa::lanes], Weights& out) {
    for (int j = 0; j < page_size / Isa::lanes; ++j) Dot::round(s[j], out + j * Isa::lanes);
  }

  static constexpr int bytes_a_step = Dot::step * sizeof(Element);
};

// The same page for queries whose scores are capped. It is a type of its own, so that visits without a cap stay as they
// are.
template <class Page>
struct Capped : Page {
  static constexpr bool capped = true;
};

constexpr int score_vectors = page_size / Isa::lanes;  // vectors that hold a score for every lane of a page
constexpr float hidden_score = -3e38f;                 // stays finite and below no_maximum when scaled

inline __attribute__((always_inline)) void multiply(Vec (&s)[score_vectors], const float* scales) {
  for (int j = 0; j < score_vectors; ++j) s[j] = Isa::mul(s[j], Isa::load(scales + j * Isa::lanes));
}

// Scales and caps the scores of a query.
inline __attribute__((always_inline)) void cap_scores(Vec (&s)[score_vectors], const PageVisit& visit) {
  const Vec factor = Isa::splat(visit.scale / visit.cap * minus_two_log2e), cap = Isa::splat(visit.cap);
  for (int j = 0; j < score_vectors; ++j) s[j] = capped(Isa::mul(s[j], factor), cap);
}

inline float greatest(const Vec (&s)[score_vectors]) {
  Vec top = s[0];
  for (int j = 1; j < score_vectors; ++j) top = Isa::max(top, s[j]);
  float best;
  Isa::store_first(&best, Isa::max_across(top));
  return best;
}

// Turns a query's scores into its weights. Updates its maximum and sums, and returns the factor by which everything
// accumulated so far has to be scaled.
template <class Page>
inline __attribute__((always_inline)) Vec softmax(const PageVisit& visit, int query, Vec (&s)[score_vectors]) {
  float* sums = visit.state + size_t(query) * state_floats(visit.head_dim) + visit.head_dim;
  float* maximum = sums + sums_width;
  if constexpr (Page::scaled) multiply(s, Page::key_scales(visit));
  if constexpr (Page::capped) cap_scores(s, visit);
  if (visit.first) {
    for (int j = 0; j < score_vectors; ++j) {
      s[j] = Isa::keep(s[j], Isa::splat(hidden_score), j * Isa::lanes, visit.first[query], visit.last[query]);
    }
  }
  Vec top = s[0];
  for (int j = 1; j < score_vectors; ++j) top = Isa::max(top, s[j]);
  const Vec scale = Isa::splat(Page::capped ? 1.0f : visit.scale);
  Vec now = Isa::splat(*maximum), rescale = Isa::splat(1.0f);
  if (Isa::any_greater(Isa::mul(top, scale), now)) {  // seldom after a split's first pages
    const Vec old = now;
    now = Isa::max(old, Isa::mul(Isa::max_across(top), scale));
    rescale = exp2(Isa::sub(old, now));
    Isa::store_first(maximum, now);
  }
  const Vec offset = Isa::sub(Isa::zero(), now);
  for (int j = 0; j < score_vectors; ++j) s[j] = exp2<Page::precision>(Isa::fma(s[j], scale, offset));
  // Sum i of the 16 has the weights of lanes i, i + 16, i + 32 and i + 48 of every page.
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

// The number of lines of the next page that are prefetched in a step, while this page is computed with. A visit of one
// tile asks for the whole page. A visit of several tiles asks for a part in each, or else it would wait for memory in
// the first tile and leave memory idle in the others. parts: 1, or more as long as a step still asks for a line.
template <class Page, int V, int parts>
constexpr int lines_ahead = V * Isa::lanes * Page::bytes_a_step / line_bytes / parts;

// Returns where the part of the next page's keys (`half` 0) or values (1) begins that a query's tile asks for.
template <class Page, int parts>
uintptr_t part_ahead(const PageVisit& visit, int half, int query) {
  const size_t bytes = Page::half_bytes(visit);
  return reinterpret_cast<uintptr_t>(visit.next) + half * bytes + query / Isa::page_rows % parts * (bytes / parts);
}

template <class Page, int M, int parts>
inline __attribute__((always_inline)) void score(const PageVisit& visit, int query, Vec (&s)[M][score_vectors]) {
  using Dot = typename Page::Dot;
  constexpr int V = Isa::page_vectors;
  const auto* keys = Page::keys(visit);
  const auto* q = static_cast<const typename Dot::Operand*>(visit.q) + size_t(query) * visit.head_dim;
  uintptr_t ahead = part_ahead<Page, parts>(visit, 0, query);
  for (int block = 0; block < score_vectors; block += V) {
    Vec acc[M][V];
    each<M, V>([&](int i, int j) { acc[i][j] = Isa::zero(); });
    accumulate<Dot, M, V, lines_ahead<Page, V, parts>>(acc, keys + block * Isa::lanes * Dot::step,
                                                       page_size * Dot::step, q, visit.head_dim,
                                                       visit.head_dim / Dot::step, ahead);
    each<M, V>([&](int i, int j) { s[i][block + j] = acc[i][j]; });
  }
}

// Adds the weighted values to the states, in V vectors of columns from `column` on.
template <class Page, int M, int V, int parts>
inline __attribute__((always_inline)) void add_values(const PageVisit& visit, int query, int column,
                                                      const typename Page::Operand* weights, const Vec (&rescale)[M],
                                                      uintptr_t& ahead) {
  using Dot = typename Page::Dot;
  const auto* values = Page::values(visit) + column * Dot::step;
  const size_t stride = state_floats(visit.head_dim);
  float* state = visit.state + query * stride + column;
  Vec acc[M][V];
  each<M, V>([&](int i, int j) { acc[i][j] = Isa::mul(Isa::load(state + i * stride + j * Isa::lanes), rescale[i]); });
  accumulate<Dot, M, V, lines_ahead<Page, V, parts>>(acc, values, visit.head_dim * Dot::step, weights, page_size,
                                                     page_size / Dot::step, ahead);
  each<M, V>([&](int i, int j) { Isa::store(state + i * stride + j * Isa::lanes, acc[i][j]); });
}

template <class Page, int M, int parts>
void visit_tile(const PageVisit& visit, int query) {
  alignas(64) typename Page::Weights weights[M];
  Vec s[M][score_vectors], rescale[M];
  score<Page, M, parts>(visit, query, s);
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
    rescale[i] = softmax<Page>(visit, query + i, s[i]);
    Page::round(s[i], weights[i]);
  }
  constexpr int block = Isa::page_vectors * Isa::lanes;
  uintptr_t ahead = part_ahead<Page, parts>(visit, 1, query);
  int column = 0;
  for (; column + block <= visit.head_dim; column += block) {
    add_values<Page, M, Isa::page_vectors, parts>(visit, query, column, weights[0], rescale, ahead);
  }
  for (; column < visit.head_dim; column += Isa::lanes) {
    add_values<Page, M, 1, parts>(visit, query, column, weights[0], rescale, ahead);
  }
}

template <class Page, int M, int parts>
void visit_queries(int m, const PageVisit& visit, int query) {
  if (m == M) return visit_tile<Page, M, parts>(visit, query);
  if constexpr (M > 1) visit_queries<Page, M - 1, parts>(m, visit, query);
}

template <class Page, int parts>
void visit_tiles(const PageVisit& visit) {
  constexpr int tile = Isa::page_rows;
  for (int query = 0; query < visit.queries; query += tile) {
    visit_queries<Page, tile, parts>(visit.queries - query < tile ? visit.queries - query : tile, visit, query);
  }
}

template <class Page>
void visit_page(const PageVisit& visit) {
  constexpr int most = lines_ahead<Page, Isa::page_vectors, 1>;
  if (most % 4 == 0 && visit.queries > 3 * Isa::page_rows) return visit_tiles<Page, most % 4 ? 1 : 4>(visit);
  if (most % 2 == 0 && visit.queries > Isa::page_rows) return visit_tiles<Page, most % 2 ? 1 : 2>(visit);
  visit_tiles<Page, 1>(visit);
}

template <class Page>
void visit(const PageVisit& visit) {
  visit.cap > 0 ? visit_page<Capped<Page>>(visit) : visit_page<Page>(visit);
}

template <class Page>
float best_score(const PageVisit& visit) {
  Vec s[1][score_vectors];
  score<Page, 1, 1>(visit, 0, s);
  return greatest(s[0]);
}

}  // namespace
}  // namespace tokenswift
