// The pages and slots that the rows of a pass attend to, checked and grouped once for all layers.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "engine/pool.h"

namespace tokenswift {

class Recall;

// AttentionSegment of kernels/base.py in the form that crosses the language boundary. The caller owns the arrays.
struct SegmentInput {
  int start = 0;  // first row in the pass
  int rows = 0;
  const int32_t* positions = nullptr;  // [rows]
  const int32_t* pages = nullptr;      // [full] pages of the pool, -1 for an evicted one, which no view may name
  int full = 0;
  const int32_t* view = nullptr;  // [layers][kv_heads][view_pages] absolute pages; null sees all
  int view_pages = 0;
  const int32_t* tail = nullptr;      // [tail_rows][tail_width] slots by position, then -1
  int tail_rows = 0, tail_width = 0;  // a chain has one tail row, and each of its rows sees a beginning of it
  const Recall* recall = nullptr;     // memory of the evicted pages, or null
};

// The rule by which rows meet keys at distances that the model was not trained for (BlockShifts of kernels/base.py).
// For the keys of block c, the query of a row at p is rotated to p - shifts[p / block - c]. The caller owns the array.
struct BlockShifts {
  const int32_t* shifts = nullptr;  // [count]; with null every key is met from the row's own position
  int count = 0;
  int pages = 1;    // pages of a block
  int trained = 0;  // trained distances; a layer whose window is no wider moves no queries

  bool serve(int window) const { return shifts && (window == 0 || window > trained); }
  int of(int position, int block) const {
    const int behind = position / (pages * page_size) - block;
    return behind > 0 ? shifts[behind] : 0;
  }
};

// The rotations of each position, [context][head_dim / 2] each, and the shifts. The caller owns the arrays.
struct RopeTables {
  const float* cos = nullptr;
  const float* sin = nullptr;
  BlockShifts shifts;
};

// Throws std::invalid_argument for shifts that do not reach over the context, or would move a query before position 0.
void check_shifts(const BlockShifts& shifts, int context);

using Slots = std::array<int32_t, page_size>;

struct RowRun {
  int begin, end;
};

// A group of a segment's rows that see the same tokens of one tail page, each up to its own position.
struct TailGroup {
  Slots slots;    // by lane, -1 in lanes that no row sees
  int page = -1;  // the page of the pool that holds all of them in their lanes, -1 if none does
  std::vector<RowRun> runs;
};

struct SegmentPlan {
  SegmentInput in;
  int last_page;                             // absolute
  std::vector<std::vector<TailGroup>> tail;  // by page, from the first page after the full ones on
};

// Makes the plan of a segment. Every index is checked here, once for each pass. Throws std::invalid_argument for any
// that could make a kernel read outside the pool, or a row see tokens that it may not.
SegmentPlan plan_segment(const SegmentInput& in, const Pool& pool, int context);

}  // namespace tokenswift
