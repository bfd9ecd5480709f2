// Some queries meet a page of bytes: an int8 page of the pool, or a copy of a bf16 page that drafts read. A query's
// result does not depend on the queries beside it here either.
//
//   keys    [head_dim / 4][64][4]    unsigned bytes: quant + 128
//   values  [16][head_dim][4]        signed bytes of four tokens: four t < 8 has tokens t, t + 16, t + 8 and t + 24,
//                                    and four t + 8 those of 32 further on (value_place in narrow.h)
//   scales  [64] of keys, [64] of values, fp32
//
// Queries are rounded to signed bytes in blocks of 64 values with a scale each, and weights to unsigned bytes with one
// scale for each query and page. Sums of their products with a page's bytes are whole numbers and exact. So they are
// the same in every ISA, and only the fp32 operations around them have to be in a fixed order:
//
//   score  = (sum over blocks, ascending, of block's scale * sum of products, by fused multiply-adds) * key's scale
//   values = fma(weights' scale, sum of products, values * rescale)
//
// The steps are made so that four neighbouring products, two of each of two steps, sum up in 16 bits, because the
// instructions of AVX2 saturate there. A key's byte is at most 255 and a value's at most 128 in size. So the scale of a
// block of queries is chosen by the largest sum of four sizes, which becomes 126, and at most 128 when each is rounded.
// The largest sum of four weights becomes 253, and at most 255. The four weights are those of tokens t, t + 16, t + 32
// and t + 48, so that their sum takes no more work than their maximum would. Such a scale is finer than that of the
// largest value where one value or weight is much larger than the others.
#pragma once

#include "math/page.h"

namespace tokenswift {

// A block of 64 values of a query.
constexpr int query_block = 64;
struct alignas(64) QueryBlock {
  int8_t quants[query_block];
  float scale;
  int32_t start;  // -128 * the sum of the quants, since a key's bytes are 128 too large
};
constexpr int query_value_bytes = sizeof(QueryBlock) / query_block;

namespace {

struct BytePage {
  struct alignas(64) Weights {
    uint8_t quants[page_size];  // in the order of the values' bytes
    float scale;
  };
  static constexpr bool scaled = true, capped = false;
  static constexpr Precision precision = Precision::short_;
  static constexpr int rows = 3;  // rows of a tile: registers hold two sums of each beside the bytes

  static size_t half_bytes(const PageVisit& visit) { return size_t(page_size) * visit.head_dim; }
  static const uint8_t* keys(const PageVisit& visit) { return reinterpret_cast<const uint8_t*>(visit.block); }
  static const uint8_t* values(const PageVisit& visit) { return keys(visit) + half_bytes(visit); }
  static const float* key_scales(const PageVisit& visit) {
    return reinterpret_cast<const float*>(visit.block + 2 * half_bytes(visit));
  }
  static const float* value_scales(const PageVisit& visit) { return key_scales(visit) + page_size; }

  static int query_blocks(const PageVisit& visit) { return (visit.head_dim + query_block - 1) / query_block; }

  // Rounds a query's weights times the values' scales. What is NaN, because a scale is, counts as zero.
  static void round(const PageVisit& visit, Vec (&s)[score_vectors], Weights& out) {
    constexpr int fours = score_vectors / 4;
    const float* scales = value_scales(visit);
    for (int j = 0; j < score_vectors; ++j) {
      s[j] = Isa::max(Isa::mul(s[j], Isa::load(scales + j * Isa::lanes)), Isa::zero());
    }
    Vec top = Isa::zero();
    for (int i = 0; i < fours; ++i) {
      const Vec sum = Isa::add(Isa::add(s[i], s[i + fours]), Isa::add(s[i + 2 * fours], s[i + 3 * fours]));
      top = Isa::max(top, sum);
    }
    float most;
    Isa::store_first(&most, Isa::max_across(top));
    Isa::store_fours(out.quants, s, Isa::splat(most > 1e-30f ? 253.0f / most : 0.0f));
    out.scale = most * (1.0f / 253.0f);
  }
};

// The products of bytes of keys with a query, and of values with weights. Each has an unsigned and a signed factor.
struct KeyProducts {
  static Isa::Shorts add(Isa::Shorts sum, Isa::Bytes columns, Isa::Bytes factors) {
    return Isa::short_dot(sum, columns, factors);
  }
};
struct ValueProducts {
  static Isa::Shorts add(Isa::Shorts sum, Isa::Bytes columns, Isa::Bytes factors) {
    return Isa::short_dot(sum, factors, columns);
  }
};

// Which bytes are multiplied: `pairs` pairs of steps, of which the second is `apart` bytes of columns, and
// `factors_apart` bytes of factors, behind the first.
struct Steps {
  int pairs;
  size_t stride, apart;  // bytes of columns from pair to pair, and from step to step
  int factor_stride, factors_apart;
};

// Which lines of the next page a tile prefetches while it computes with this one: those from `next` on, before `end`.
struct LinesAhead {
  uintptr_t next, end;
};

// sums[i][j] += the products of the bytes of vector j of the columns with the factors of row i, four in each step.
// Requests for the next page are spread over the steps of all tiles of a visit, because a core can wait for few lines
// at once: asked for in a burst, they are waited for. A pair of steps of the only tile asks for as many lines as it
// reads. Of two or three tiles each asks for its share, half as many lines a pair, until it has it. Of more tiles none
// asks in its steps (parts of 0): they compute for longer than the memory takes, and each step would pay for the
// question.
constexpr int lines_a_pair(int vectors) { return vectors * Isa::lanes * 8 / line_bytes; }

template <class Products, int parts, int M, int V, class FactorsOf>
inline __attribute__((always_inline)) void add_products(Isa::Wholes (&sums)[M][V], const uint8_t* columns,
                                                        const Steps& steps, LinesAhead& ahead,
                                                        const FactorsOf& factors_of) {
  constexpr int lines = parts ? lines_a_pair(V) / parts : 0, width = Isa::lanes * 4;
  for (int pair = 0; pair < steps.pairs; ++pair, columns += steps.stride) {
    Isa::Bytes first[V], second[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      first[j] = Isa::load_bytes(columns + j * width);
      second[j] = Isa::load_bytes(columns + steps.apart + j * width);
    }
    if (lines && (parts == 1 || ahead.next < ahead.end)) {
#pragma GCC unroll 4
      for (int j = 0; j < lines; ++j) Isa::prefetch(reinterpret_cast<const void*>(ahead.next + j * line_bytes));
      ahead.next += lines * line_bytes;
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      const auto* row = factors_of(i) + pair * steps.factor_stride;
      const Isa::Bytes one = Isa::repeat(row), two = Isa::repeat(row + steps.factors_apart);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        const Isa::Shorts products = Products::add(Products::add(Isa::shorts(), first[j], one), second[j], two);
        sums[i][j] = Isa::add_shorts(sums[i][j], products);
      }
    }
  }
}

template <int M, int parts>
inline __attribute__((always_inline)) void score_bytes(const PageVisit& visit, int query, LinesAhead& ahead,
                                                       Vec (&s)[M][score_vectors]) {
  constexpr int V = Isa::page_vectors;
  const int blocks = BytePage::query_blocks(visit);
  const auto* q = static_cast<const QueryBlock*>(visit.q) + size_t(query) * blocks;
  for (int vector = 0; vector < score_vectors; vector += V) {
    Vec acc[M][V];
    each<M, V>([&](int i, int j) { acc[i][j] = Isa::zero(); });
    const uint8_t* columns = BytePage::keys(visit) + vector * Isa::lanes * 4;
    for (int block = 0; block < blocks; ++block, columns += query_block * page_size) {
      const QueryBlock* part = q + block;
      const int rest = visit.head_dim - block * query_block;
      Isa::Wholes sums[M][V];
      each<M, V>([&](int i, int j) { sums[i][j] = Isa::wholes(part[i * blocks].start); });
      const Steps steps{(rest < query_block ? rest : query_block) / 8, page_size * 8, page_size * 4, 8, 4};
      add_products<KeyProducts, parts>(sums, columns, steps, ahead, [&](int i) { return part[i * blocks].quants; });
      each<M, V>([&](int i, int j) {
        acc[i][j] = Isa::fma(Isa::splat(part[i * blocks].scale), Isa::to_floats(sums[i][j]), acc[i][j]);
      });
    }
    each<M, V>([&](int i, int j) { s[i][vector + j] = acc[i][j]; });
  }
}

// Adds the weighted values to the states, in V vectors of columns from `column` on.
template <int M, int V, int parts>
inline __attribute__((always_inline)) void add_byte_values(const PageVisit& visit, int query, int column,
                                                           const BytePage::Weights (&weights)[M],
                                                           const Vec (&rescale)[M], LinesAhead& ahead) {
  Isa::Wholes sums[M][V];
  each<M, V>([&](int i, int j) { sums[i][j] = Isa::wholes(0); });
  const uint8_t* columns = BytePage::values(visit) + column * 4;
  const Steps steps{page_size / 8, size_t(visit.head_dim) * 4, size_t(visit.head_dim) * 32, 4, 32};
  add_products<ValueProducts, parts>(sums, columns, steps, ahead, [&](int i) { return weights[i].quants; });
  const size_t stride = state_floats(visit.head_dim);
  float* state = visit.state + query * stride + column;
  each<M, V>([&](int i, int j) {
    float* at = state + i * stride + j * Isa::lanes;
    const Vec kept = Isa::mul(Isa::load(at), rescale[i]);
    Isa::store(at, Isa::fma(Isa::splat(weights[i].scale), Isa::to_floats(sums[i][j]), kept));
  });
}

inline int lines_of(int head_dim) { return (page_size * head_dim + page_size * int(sizeof(float))) * 2 / line_bytes; }

// Returns how many lines the steps of a tile ask for.
template <int parts>
int lines_in_steps(int head_dim) {
  constexpr int V = Isa::page_vectors, width = V * Isa::lanes;
  constexpr int wide = parts ? lines_a_pair(V) / parts : 0, narrow = parts ? lines_a_pair(1) / parts : 0;
  const int columns = head_dim / width * wide + head_dim % width / Isa::lanes * narrow;
  return head_dim / 8 * (score_vectors / V) * wide + page_size / 8 * columns;
}

template <class Page, int M, int parts>
void visit_byte_tile(const PageVisit& visit, int query, LinesAhead ahead) {
  BytePage::Weights weights[M];
  Vec s[M][score_vectors], rescale[M];
  const int lines = int(ahead.end - ahead.next) / line_bytes - lines_in_steps<parts>(visit.head_dim);
  score_bytes<M, parts>(visit, query, ahead, s);
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
    for (int j = i; j < lines; j += M, ahead.next += line_bytes) {  // those that no step asks for
      Isa::prefetch(reinterpret_cast<const void*>(ahead.next));
    }
    rescale[i] = softmax<Page>(visit, query + i, s[i]);
  }
  // Apart from the loop above, so that a core computes with all rows while it waits for their maxima.
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) BytePage::round(visit, s[i], weights[i]);
  constexpr int block = Isa::page_vectors * Isa::lanes;
  int column = 0;
  for (; column + block <= visit.head_dim; column += block) {
    add_byte_values<M, Isa::page_vectors, parts>(visit, query, column, weights, rescale, ahead);
  }
  for (; column < visit.head_dim; column += Isa::lanes) {
    add_byte_values<M, 1, parts>(visit, query, column, weights, rescale, ahead);
  }
}

template <class Page, int parts>
void visit_byte_tiles(const PageVisit& visit) {
  const int tiles = (visit.queries + BytePage::rows - 1) / BytePage::rows, lines = lines_of(visit.head_dim);
  const auto next = reinterpret_cast<uintptr_t>(visit.next);
  for (int tile = 0, query = 0; tile < tiles; ++tile, query += BytePage::rows) {
    const LinesAhead ahead{next + lines * tile / tiles * line_bytes, next + lines * (tile + 1) / tiles * line_bytes};
    switch (visit.queries - query) {
      case 1:
        visit_byte_tile<Page, 1, parts>(visit, query, ahead);
        break;
      case 2:
        visit_byte_tile<Page, 2, parts>(visit, query, ahead);
        break;
      default:
        visit_byte_tile<Page, BytePage::rows, parts>(visit, query, ahead);
    }
  }
}

template <class Page>
void visit_byte_page(const PageVisit& visit) {
  if (visit.queries <= BytePage::rows) return visit_byte_tiles<Page, 1>(visit);
  if (visit.queries <= 3 * BytePage::rows) return visit_byte_tiles<Page, 2>(visit);
  visit_byte_tiles<Page, 0>(visit);
}

inline void visit_bytes(const PageVisit& visit) {
  visit.cap > 0 ? visit_byte_page<Capped<BytePage>>(visit) : visit_byte_page<BytePage>(visit);
}

inline float best_byte_score(const PageVisit& visit) {
  Vec s[1][score_vectors];
  const auto next = reinterpret_cast<uintptr_t>(visit.next);
  LinesAhead ahead{next, next + lines_of(visit.head_dim) * line_bytes};
  score_bytes<1, 1>(visit, 0, ahead, s);
  multiply(s[0], BytePage::key_scales(visit));
  return greatest(s[0]);
}

// Rounds a query to blocks. The last one is filled with zeros. Where a value is not finite, the scale is not finite
// either, nor is any score made with it.
inline void round_query(const float* x, int n, void* out) {
  auto* block = static_cast<QueryBlock*>(out);
  for (; n > 0; n -= query_block, x += query_block, ++block) {
    float values[query_block] = {};
    std::memcpy(values, x, (n < query_block ? n : query_block) * sizeof *x);
    float most = 0.0f;
    for (int i = 0; i < query_block; i += 8) {
      for (int j = i; j < i + 4; j += 2) {  // the four whose products are summed in 16 bits
        const float sum =
            (std::fabs(values[j]) + std::fabs(values[j + 1])) + (std::fabs(values[j + 4]) + std::fabs(values[j + 5]));
        most = sum > most || sum != sum ? sum : most;
      }
    }
    const float inverse = most > 1e-30f ? 126.0f / most : 0.0f;
    int32_t sum = 0;
    for (int i = 0; i < query_block; ++i) {
      block->quants[i] = int8_t(nearest_whole(values[i] * inverse));
      sum += block->quants[i];
    }
    block->scale = most / 126.0f;
    block->start = -128 * sum;
  }
}

}  // namespace
}  // namespace tokenswift
