#include "engine/plan.h"

#include <algorithm>

#include "engine/require.h"

namespace tokenswift {
namespace {

const int32_t* tail_of(const SegmentInput& in, int row) {
  return in.tail + size_t(in.tail_rows == 1 ? 0 : row) * in.tail_width;
}

void check_view(const SegmentInput& in, const Pool& pool) {
  const int lists = pool.layers() * pool.kv_heads();
  for (int list = 0; list < lists; ++list) {
    const int32_t* pages = in.view + size_t(list) * in.view_pages;
    for (int i = 0; i < in.view_pages; ++i) {
      require(pages[i] >= 0 && pages[i] < in.full, "a view names a page that is not full: ", pages[i]);
      require(in.pages[pages[i]] >= 0, "a view names a page that was evicted: ", pages[i]);
      require(i == 0 || pages[i] > pages[i - 1], "a view's pages must be ascending: ", pages[i]);
    }
  }
}

void check(const SegmentInput& in, const Pool& pool, int context) {
  require(in.rows > 0, "a segment without rows: ", in.rows);
  require(in.tail_rows == 1 || in.tail_rows == in.rows, "tail rows: ", in.tail_rows);
  for (int i = 0; i < in.full; ++i) {
    const bool evicted = in.view && in.pages[i] == -1;
    require(evicted || pool.usable(in.pages[i]), "a page that is not in use: ", in.pages[i]);
  }
  const int boundary = in.full * page_size;
  for (int row = 0; row < in.rows; ++row) {
    const int position = in.positions[row];
    require(position >= boundary && position < context, "a position outside the tail and the context: ", position);
    const int count = position - boundary + 1;
    require(count <= in.tail_width, "a row without slots for its positions: ", position);
    const int32_t* slots = tail_of(in, row);
    // With one list for all rows, the longest row's check covers the others.
    const bool covered = in.tail_rows == 1 && row + 1 < in.rows && in.positions[row + 1] > position;
    if (covered) continue;
    for (int i = 0; i < count; ++i) require(pool.usable_slot(slots[i]), "a slot that is not in use: ", slots[i]);
  }
  if (in.view) check_view(in, pool);
}

// Returns how many lanes of tail page `page` a row sees. Pages are counted from the boundary on.
int visible(const SegmentInput& in, int row, int page) {
  return std::clamp(in.positions[row] - (in.full + page) * page_size + 1, 0, page_size);
}

void add_row(TailGroup& group, int row) {
  if (!group.runs.empty() && group.runs.back().end == row) ++group.runs.back().end;
  else group.runs.push_back({row, row + 1});
}

// Returns the group that a row with `count` slots belongs to, or a new one. A row belongs to a group if one of their
// two lists is a beginning of the other.
TailGroup& group_for(std::vector<TailGroup>& groups, std::vector<int>& counts, const int32_t* slots, int count) {
  for (size_t i = 0; i < groups.size(); ++i) {
    const int common = std::min(count, counts[i]);
    if (!std::equal(slots, slots + common, groups[i].slots.begin())) continue;
    if (count > counts[i]) {
      std::copy(slots, slots + count, groups[i].slots.begin());
      counts[i] = count;
    }
    return groups[i];
  }
  groups.emplace_back();
  groups.back().slots.fill(-1);
  std::copy(slots, slots + count, groups.back().slots.begin());
  counts.push_back(count);
  return groups.back();
}

int page_in_place(const TailGroup& group) {
  const int page = group.slots[0] / page_size;
  for (int i = 0; i < page_size; ++i) {
    if (group.slots[i] != page * page_size + i) return -1;
  }
  return page;
}

std::vector<TailGroup> group_rows(const SegmentInput& in, int page) {
  std::vector<TailGroup> groups;
  std::vector<int> counts;
  for (int row = 0; row < in.rows; ++row) {
    const int count = visible(in, row, page);
    if (count > 0) add_row(group_for(groups, counts, tail_of(in, row) + page * page_size, count), row);
  }
  for (TailGroup& group : groups) group.page = page_in_place(group);
  return groups;
}

}  // namespace

void check_shifts(const BlockShifts& all, int context) {
  if (!all.shifts) return;
  require(all.pages > 0 && all.pages <= 1 << 20, "pages of a block of shifts: ", all.pages);
  const long block = long(all.pages) * page_size;
  require(all.count > (context - 1) / block, "shifts of too few blocks: ", all.count);
  for (int i = 0; i < all.count; ++i)
    require(all.shifts[i] >= 0 && all.shifts[i] <= i * block, "a shift: ", all.shifts[i]);
}

SegmentPlan plan_segment(const SegmentInput& in, const Pool& pool, int context) {
  check(in, pool, context);
  SegmentPlan plan{in, 0, {}};
  plan.last_page = *std::max_element(in.positions, in.positions + in.rows) / page_size;
  for (int page = 0; in.full + page <= plan.last_page; ++page) plan.tail.push_back(group_rows(in, page));
  return plan;
}

}  // namespace tokenswift
