// The work when some queries meet one page (math/page.h), by tiles: sixteen queries at a time.
//
//   scores  [16][64]         four tiles; products of 32 dimensions each, in their order
//   values  [16][head_dim]   products of 32 tokens each, from zero on: state = fma(state, rescale, products)
//
// A query's result does not depend on the queries beside it. Where there are fewer than sixteen, the others are what
// lies behind them in memory (spare_rows), and what comes of them is dropped.
#pragma once

#include "math/page.h"
#include "tiles/tiles.h"

namespace tokenswift {
namespace {

struct TilePage {
  static constexpr bool scaled = false, capped = false;
  static constexpr Precision precision = Precision::short_;
};

// Asks for the lines of the next page, a few with every tile that is loaded and every query that is worked on in
// vectors, so that memory is never without requests, nor the tiles' loads behind a burst of them. They go to the
// second-level cache, which can wait for more lines at once than the first: after many pages 27 queries take 16 % less
// time a page than with requests to the first-level cache by the tiles alone, 3 queries 11 %.
class NextPage {
 public:
  // bytes: of the page. times: how often ask() will be called.
  NextPage(const char* page, int bytes, int times)
      : at_(page), end_(page + bytes), step_((bytes / line_bytes + times - 1) / times * line_bytes) {}

  void ask() {
    const char* const end = std::min(at_ + step_, end_);
    for (; at_ < end; at_ += line_bytes) __builtin_prefetch(at_, 0, second_level);
  }

 private:
  static constexpr int second_level = 2;
  const char *at_, *end_;
  int step_;
};

// Returns the requests of a visit. bytes: of the page. loads: tiles of keys and values that a tile of queries loads.
inline NextPage next_of(const PageVisit& visit, int bytes, int loads) {
  const int tiles = (visit.queries + tile_rows - 1) / tile_rows;
  const int steps = 1 + (visit.head_dim + page_size - 1) / page_size;  // of a query: its weights, and 64 columns each
  return NextPage(visit.next, bytes, tiles * loads + visit.queries * steps);
}

struct TileScratch {
  alignas(64) float scores[tile_rows][page_size];  // then the products of values
  alignas(64) uint16_t weights[tile_rows][page_size];
  Vec rescale[tile_rows];
};

// Computes the products of sixteen queries with a page's keys. Queries are `q_bytes` apart. rows: how many of them are
// in memory of ours; the others count as zeros.
inline void score_tiles(const PageVisit& visit, const char* q, size_t q_bytes, int rows, NextPage& next,
                        TileScratch& out) {
  constexpr size_t stride = page_size * 4;  // bytes of a pair of dimensions
  zero_four();
  const char* keys = visit.block;
  for (int pairs = visit.head_dim / 2; pairs > 0; pairs -= tile_rows, q += tile_bytes, keys += tile_rows * stride) {
    load_part<4>(q, q_bytes, rows);
    load_part<6>(keys, stride, pairs);
    Tiles::dot_bf16<0, 4, 6>();
    next.ask();
    load_part<7>(keys + tile_bytes, stride, pairs);
    Tiles::dot_bf16<1, 4, 7>();
    next.ask();
    load_part<6>(keys + 2 * tile_bytes, stride, pairs);
    Tiles::dot_bf16<2, 4, 6>();
    next.ask();
    load_part<7>(keys + 3 * tile_bytes, stride, pairs);
    Tiles::dot_bf16<3, 4, 7>();
    next.ask();
  }
  store_four(out.scores);
}

// Computes the products of sixteen queries' weights with 16 columns of a page's values, in tile t.
template <int t>
void value_tile(const PageVisit& visit, int column, NextPage& next) {
  const size_t stride = size_t(visit.head_dim) * 4;  // bytes of a pair of tokens
  const char* values = visit.block + size_t(page_size) * visit.head_dim * 2 + column * 4;
  Tiles::zero<t>();
  Tiles::load<6>(values, stride);
  Tiles::dot_bf16<t, 4, 6>();
  next.ask();
  Tiles::load<7>(values + tile_rows * stride, stride);
  Tiles::dot_bf16<t, 5, 7>();
  next.ask();
}

// Adds the weighted values to the states of `count` queries, 64 columns at a time.
inline void add_value_tiles(const PageVisit& visit, int query, int count, NextPage& next, TileScratch& scratch) {
  Tiles::load<4>(scratch.weights, sizeof *scratch.weights);
  Tiles::load<5>(scratch.weights[0] + tile_values, sizeof *scratch.weights);
  for (int column = 0; column < visit.head_dim; column += page_size) {
    const int tiles = std::min(visit.head_dim - column, page_size) / tile_columns;
    value_tile<0>(visit, column, next);
    if (tiles > 1) value_tile<1>(visit, column + tile_columns, next);
    if (tiles > 2) value_tile<2>(visit, column + 2 * tile_columns, next);
    if (tiles > 3) value_tile<3>(visit, column + 3 * tile_columns, next);
    store_four(scratch.scores);
    float* state = visit.state + query * size_t(state_floats(visit.head_dim)) + column;
    for (int i = 0; i < count; ++i, state += state_floats(visit.head_dim)) {
      next.ask();
      for (int j = 0; j < tiles * tile_columns; j += tile_columns) {
        const Vec more = Isa::load(scratch.scores[i] + j);
        Isa::store(state + j, Isa::fma(Isa::load(state + j), scratch.rescale[i], more));
      }
    }
  }
}

template <class Page>
void visit_page_by_tiles(const PageVisit& visit) {
  Tiles::use();
  TileScratch scratch;
  const size_t q_bytes = size_t(round_up(visit.head_dim, tile_values)) * sizeof(uint16_t);
  const int loads = (visit.head_dim + tile_values - 1) / tile_values * 4 + visit.head_dim / tile_columns * 2;
  NextPage next = next_of(visit, page_size * visit.head_dim * 4, loads);
  const auto* q = static_cast<const char*>(visit.q);
  for (int query = 0; query < visit.queries; query += tile_rows, q += tile_rows * q_bytes) {
    const int count = std::min(visit.queries - query, tile_rows);
    score_tiles(visit, q, q_bytes, tile_rows, next, scratch);
    for (int i = 0; i < count; ++i) {
      next.ask();
      Vec s[score_vectors];
      for (int j = 0; j < score_vectors; ++j) s[j] = Isa::load(scratch.scores[i] + j * tile_columns);
      scratch.rescale[i] = softmax<Page>(visit, query + i, s);
      for (int j = 0; j < score_vectors; ++j) round_to_bf16(s[j], scratch.weights[i] + j * tile_columns);
    }
    add_value_tiles(visit, query, count, next, scratch);
  }
}

inline void visit_by_tiles(const PageVisit& visit) {
  visit.cap > 0 ? visit_page_by_tiles<Capped<TilePage>>(visit) : visit_page_by_tiles<TilePage>(visit);
}

inline float best_score_by_tiles(const PageVisit& visit) {
  Tiles::use();
  TileScratch scratch;
  NextPage next(visit.next, page_size * visit.head_dim * 4, (visit.head_dim + tile_values - 1) / tile_values * 4);
  const size_t q_bytes = size_t(round_up(visit.head_dim, tile_values)) * sizeof(uint16_t);
  score_tiles(visit, static_cast<const char*>(visit.q), q_bytes, 1, next, scratch);
  Vec s[score_vectors];
  for (int j = 0; j < score_vectors; ++j) s[j] = Isa::load(scratch.scores[0] + j * tile_columns);
  return greatest(s);
}

}  // namespace
}  // namespace tokenswift
