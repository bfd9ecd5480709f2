// The work when some queries meet a page of bytes (math/page_bytes.h), by tiles: sixteen queries at a time. It has the
// bits of the functions there: sums of products are whole numbers, and what is done with them is the same.
#pragma once

#include "math/page_bytes.h"
#include "tiles/pages.h"

namespace tokenswift {
namespace {

constexpr int few_queries = 2 * BytePage::rows;  // up to so many are visited without tiles, which saves no time

struct ByteScratch {
  alignas(64) int32_t sums[tile_rows][page_size];
  alignas(64) float scores[tile_rows][page_size];
  BytePage::Weights weights[tile_rows];
  Vec rescale[tile_rows];
};

// Computes the scores of sixteen queries but for the keys' scales. Writes those of `count`.
inline void score_byte_tiles(const PageVisit& visit, const QueryBlock* q, int count, NextPage& next, ByteScratch& out) {
  constexpr size_t stride = page_size * 4;
  const int blocks = BytePage::query_blocks(visit);
  for (int block = 0; block < blocks; ++block) {
    const char* keys = visit.block + block * query_block * page_size;
    const int fours = std::min(visit.head_dim - block * query_block, query_block) / 4;
    zero_four();
    Tiles::load<4>(q[block].quants, blocks * sizeof *q);
    load_part<6>(keys, stride, fours);
    Tiles::dot_signed_unsigned<0, 4, 6>();
    next.ask();
    load_part<7>(keys + tile_bytes, stride, fours);
    Tiles::dot_signed_unsigned<1, 4, 7>();
    next.ask();
    load_part<6>(keys + 2 * tile_bytes, stride, fours);
    Tiles::dot_signed_unsigned<2, 4, 6>();
    next.ask();
    load_part<7>(keys + 3 * tile_bytes, stride, fours);
    Tiles::dot_signed_unsigned<3, 4, 7>();
    next.ask();
    store_four(out.sums);
    for (int i = 0; i < count; ++i) {
      const QueryBlock& own = q[i * blocks + block];
      for (int j = 0; j < page_size; j += tile_columns) {
        const Vec sum = Isa::to_floats(Isa::add_whole(out.sums[i] + j, own.start));
        const Vec before = block ? Isa::load(out.scores[i] + j) : Isa::zero();
        Isa::store(out.scores[i] + j, Isa::fma(Isa::splat(own.scale), sum, before));
      }
    }
  }
}

template <int t>
void byte_value_tile(const PageVisit& visit, int column, NextPage& next) {
  Tiles::zero<t>();
  Tiles::load<6>(BytePage::values(visit) + column * 4, size_t(visit.head_dim) * 4);
  Tiles::dot_unsigned_signed<t, 4, 6>();
  next.ask();
}

// Adds the weighted values to the states of `count` queries, 64 columns at a time.
inline void add_byte_value_tiles(const PageVisit& visit, int query, int count, NextPage& next, ByteScratch& scratch) {
  Tiles::load<4>(scratch.weights[0].quants, sizeof *scratch.weights);
  for (int column = 0; column < visit.head_dim; column += page_size) {
    const int tiles = std::min(visit.head_dim - column, page_size) / tile_columns;
    byte_value_tile<0>(visit, column, next);
    if (tiles > 1) byte_value_tile<1>(visit, column + tile_columns, next);
    if (tiles > 2) byte_value_tile<2>(visit, column + 2 * tile_columns, next);
    if (tiles > 3) byte_value_tile<3>(visit, column + 3 * tile_columns, next);
    store_four(scratch.sums);
    float* state = visit.state + query * size_t(state_floats(visit.head_dim)) + column;
    for (int i = 0; i < count; ++i, state += state_floats(visit.head_dim)) {
      next.ask();
      for (int j = 0; j < tiles * tile_columns; j += tile_columns) {
        const Vec kept = Isa::mul(Isa::load(state + j), scratch.rescale[i]);
        const Vec sum = Isa::whole_floats(scratch.sums[i] + j);
        Isa::store(state + j, Isa::fma(Isa::splat(scratch.weights[i].scale), sum, kept));
      }
    }
  }
}

template <class Page>
void visit_bytes_page_by_tiles(const PageVisit& visit) {
  Tiles::use();
  ByteScratch scratch;
  const int blocks = BytePage::query_blocks(visit);
  NextPage next = next_of(visit, lines_of(visit.head_dim) * line_bytes, blocks * 4 + visit.head_dim / tile_columns);
  const auto* q = static_cast<const QueryBlock*>(visit.q);
  for (int query = 0; query < visit.queries; query += tile_rows, q += tile_rows * blocks) {
    const int count = std::min(visit.queries - query, tile_rows);
    score_byte_tiles(visit, q, count, next, scratch);
    for (int i = 0; i < count; ++i) {
      next.ask();
      Vec s[score_vectors];
      for (int j = 0; j < score_vectors; ++j) s[j] = Isa::load(scratch.scores[i] + j * tile_columns);
      scratch.rescale[i] = softmax<Page>(visit, query + i, s);
      BytePage::round(visit, s, scratch.weights[i]);
    }
    add_byte_value_tiles(visit, query, count, next, scratch);
  }
}

inline void visit_bytes_by_tiles(const PageVisit& visit) {
  if (visit.queries <= few_queries) return visit_bytes(visit);
  visit.cap > 0 ? visit_bytes_page_by_tiles<Capped<BytePage>>(visit) : visit_bytes_page_by_tiles<BytePage>(visit);
}

}  // namespace
}  // namespace tokenswift
