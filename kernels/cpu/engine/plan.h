// What the rows of a pass attend to, checked and grouped once for all layers.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "engine/pool.h"

namespace tokenswift {

// The boundary's own form of kernels/base.py's AttentionSegment; the arrays stay the caller's.
struct SegmentInput {
  int start = 0;  // first row in the pass
  int rows = 0;
  const int32_t* positions = nullptr;  // [rows]
  const int32_t* pages = nullptr;      // [full] pages of the pool; -1 for an evicted one, which no view may name
  int full = 0;
  const int32_t* view = nullptr;  // [layers][kv_heads][view_pages] absolute pages; null is all
  int view_pages = 0;
  const int32_t* tail = nullptr;      // [tail_rows][tail_width] slots by position, -1 behind them
  int tail_rows = 0, tail_width = 0;  // one tail row for all: a chain whose rows see its beginning
};

// How rows meet keys at distances that the model was not trained for: the query of a row at p is rotated to
// p - shifts[p / block - c] for the keys of block c (kernels/base.py, BlockShifts). The array stays the caller's.
struct BlockShifts {
  const int32_t* shifts = nullptr;  // [count]; null is none: every key is met from the row's own position
  int count = 0;
  int pages = 1;    // of a block
  int trained = 0;  // a layer whose window is no wider moves nothing

  bool serve(int window) const { return shifts && (window == 0 || window > trained); }
  int of(int position, int block) const {
    const int behind = position / (pages * page_size) - block;
    return behind > 0 ? shifts[behind] : 0;
  }
};

// Rotations by position, [context][head_dim / 2] each, and how far keys are met. The arrays stay the caller's.
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

// Rows of a segment that see the same tokens of one tail page, each up to its own position.
struct TailGroup {
  Slots slots;    // by lane, -1 where nobody looks
  int page = -1;  // the page of the pool that holds them just so, if one does
  std::vector<RowRun> runs;
};

struct SegmentPlan {
  SegmentInput in;
  int last_page;                             // absolute
  std::vector<std::vector<TailGroup>> tail;  // by page behind the full ones
};

// Throws std::invalid_argument for anything that could make a kernel read outside the pool or a row see what it may
// not: every index is checked here, once a pass.
SegmentPlan plan_segment(const SegmentInput& in, const Pool& pool, int context);

}  // namespace tokenswift
