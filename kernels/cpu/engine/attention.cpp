#include "engine/attention.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace tokenswift {
namespace {

constexpr double log2e = 1.4426950408889634;
constexpr int split_pages = 16;     // part of the numerics contract
constexpr int own_split_pages = 8;  // pages of a view's own split; they are so few that all threads end together
constexpr int pieces_a_thread = 6;  // so many that one more or less at the end does not matter
constexpr int block_queries = 48;   // queries whose states stay in the first-level cache beside a page

int rows_a_block(int group) { return std::max(1, block_queries / group); }

}  // namespace

void Attention::prepare(std::vector<SegmentPlan> segments, const Pool& pool, const PageCopies* copies,
                        const RopeTables& rope, int rows, int mass_pages, int threads) {
  segments_ = std::move(segments);
  pool_ = &pool;
  copies_ = copies;
  rope_ = rope;
  rows_ = rows;
  threads_ = threads;
  group_ = heads_ / pool.kv_heads();
  mass_stride_ = mass_pages;
  views_ = false;
  segment_states_.resize(segments_.size());
  size_t states = 0;
  for (size_t i = 0; i < segments_.size(); ++i) {
    const SegmentPlan& segment = segments_[i];
    const bool own = has_own_splits(segment.in);
    const int splits =
        own ? (segment.in.view_pages + own_split_pages - 1) / own_split_pages + 1 : segment.last_page / split_pages + 1;
    const int block = rows_a_block(group_);
    const int blocks = (segment.in.rows + block - 1) / block;
    SegmentState& state = segment_states_[i];
    state.own = own;
    state.whole = splits == 1 || blocks * pool.kv_heads() >= pieces_a_thread * threads;
    state.states = states;
    states += size_t(state.whole ? 1 : splits) * segment.in.rows * heads_ * state_floats(head_dim_);
    state.splits.assign(pool.kv_heads(), std::vector<int>(splits));
    for (std::vector<int>& all : state.splits) std::iota(all.begin(), all.end(), 0);
    views_ |= segment.in.view != nullptr;
  }
  pieces_.clear();
  if (!views_) {
    for (size_t i = 0; i < segments_.size(); ++i) add_pieces(int(i));
  }
  const size_t queries = size_t(rows) * heads_;
  states_.reserve(states);
  mass_.reserve(queries * mass_stride_);
  mass_maximum_.reserve(queries * mass_stride_);
  scratch_.resize(threads);
  for (Scratch& scratch : scratch_) {
    const size_t block = size_t(rows_a_block(group_)) * group_;
    scratch.page.reserve(pool.block_bytes());
    scratch.states.reserve(block * state_floats(head_dim_));
    scratch.first.resize(block);
    scratch.last.resize(block);
    if (rope.shifts.shifts)
      scratch.moved.reserve((block + spare_rows) * std::max(query_bytes(false), query_bytes(true)));
  }
}

// Finds the splits in which a layer's view has a page, and those of the tail.
void Attention::find_splits(int segment, int layer) {
  const SegmentPlan& plan = segments_[segment];
  if (!plan.in.view || segment_states_[segment].own) return;
  for (int head = 0; head < pool_->kv_heads(); ++head) {
    const int32_t* view = view_of(segment, layer, head);
    std::vector<int>& splits = segment_states_[segment].splits[head];
    splits.clear();
    const auto add = [&](int split) {
      if (splits.empty() || splits.back() < split) splits.push_back(split);
    };
    for (int i = 0; i < plan.in.view_pages; ++i) add(view[i] / split_pages);
    for (int split = plan.in.full / split_pages; split <= plan.last_page / split_pages; ++split) add(split);
  }
}

// Where there are blocks of rows enough for all threads, a piece walks all splits of its rows and merges as it goes.
// Otherwise the splits are shared out too. Then a piece is one split, or several where a view leaves them almost empty.
void Attention::add_pieces(int segment) {
  const SegmentInput& in = segments_[segment].in;
  const int block = rows_a_block(group_), heads = pool_->kv_heads();
  for (int head = 0; head < heads; ++head) {
    const int splits = int(segment_states_[segment].splits[head].size());
    const int wanted = std::max(1, pieces_a_thread * threads_ / heads);
    const int share = segment_states_[segment].whole ? splits : in.view ? (splits + wanted - 1) / wanted : 1;
    for (int split = 0; split < splits; split += share) {
      for (int row = 0; row < in.rows; row += block) {
        const RowRun rows{row, std::min(row + block, in.rows)}, shared{split, std::min(split + share, splits)};
        pieces_.push_back({segment, head, rows, shared});
      }
    }
  }
}

float* Attention::state(int segment, int part, int head, int row) {
  const size_t rows = segments_[segment].in.rows;
  const size_t query = ((size_t(part) * pool_->kv_heads() + head) * rows + row) * group_;
  return states_.data() + segment_states_[segment].states + query * state_floats(head_dim_);
}

void Attention::run(Team& team, const AttentionLayer& layer) {
  if (layer.mass) {
    const size_t count = size_t(rows_) * heads_ * mass_stride_;
    std::fill_n(mass_.data(), count, 0.0f);
    std::fill_n(mass_maximum_.data(), count, no_maximum);
  }
  if (views_) {
    pieces_.clear();
    for (size_t i = 0; i < segments_.size(); ++i) {
      find_splits(int(i), layer.layer);
      add_pieces(int(i));
    }
  }
  team.run(int(pieces_.size()), [&](int piece, int worker) { run_piece(layer, piece, scratch_[worker]); });
  for (size_t i = 0; i < segments_.size(); ++i) {
    const int rows = segments_[i].in.rows, kv_heads = pool_->kv_heads();
    const Recall* recall = segments_[i].in.recall;
    const bool reads = recall && recall->keeps(layer.layer);
    const size_t of_memory = reads ? size_t(2) * recall->shape().features * head_dim_ : 0;
    const size_t of_states = segment_states_[i].parts(0) * head_dim_ + mass_stride_;
    const size_t cost = size_t(rows) * heads_ * (of_states + of_memory);
    team.run(rows * kv_heads, cost, [&](int piece, int) { finish(layer, int(i), piece / kv_heads, piece % kv_heads); });
  }
}

void Attention::run_piece(const AttentionLayer& layer, int index, Scratch& scratch) {
  const Piece& piece = pieces_[index];
  const int queries = (piece.rows.end - piece.rows.begin) * group_;
  const size_t stride = state_floats(head_dim_);
  const SegmentState& kept = segment_states_[piece.segment];
  const std::vector<int>& splits = kept.splits[piece.head];
  scratch.block = -1;
  for (int i = piece.splits.begin; i < piece.splits.end; ++i) {
    const char* behind = nullptr;
    if (i + 1 < piece.splits.end) {
      behind = first_block(layer, piece, splits[i + 1]);
    } else if (size_t(index) + 1 < pieces_.size()) {  // usually the one that this thread takes next
      const Piece& next = pieces_[index + 1];
      behind = first_block(layer, next, segment_states_[next.segment].splits[next.head][next.splits.begin]);
    }
    float* own = state(piece.segment, kept.whole ? 0 : i, piece.head, piece.rows.begin);
    if (!kept.whole || i == piece.splits.begin) {
      run_split(layer, piece, splits[i], behind, own, scratch);
      continue;
    }
    run_split(layer, piece, splits[i], behind, scratch.states.data(), scratch);
    for (int query = 0; query < queries; ++query) {
      kernels_.merge(own + query * stride, scratch.states.data() + query * stride, head_dim_);
    }
  }
}

// behind: the block that is visited after this split's full pages, or null.
void Attention::run_split(const AttentionLayer& layer, const Piece& piece, int split, const char* behind, float* states,
                          Scratch& scratch) {
  const int queries = (piece.rows.end - piece.rows.begin) * group_;
  const SegmentPlan& segment = segments_[piece.segment];
  for (int query = 0; query < queries; ++query) {
    float* state = states + size_t(query) * state_floats(head_dim_);
    std::fill_n(state, head_dim_ + sums_width, 0.0f);
    state[state_maximum(head_dim_)] = no_maximum;
  }
  visit_full_pages(layer, piece, split, behind, states, scratch);
  const SegmentState& kept = segment_states_[piece.segment];
  if (kept.own && split != kept.splits[piece.head].back()) return;  // the last split has the tail
  const int begin = kept.own ? segment.in.full : std::max(split * split_pages, segment.in.full);
  const int end = kept.own ? segment.last_page + 1 : std::min((split + 1) * split_pages, segment.last_page + 1);
  for (int page = begin; page < end; ++page) visit_tail(layer, piece, page, states, scratch);
}

int Attention::first_visible(const SegmentInput& in, RowRun rows, int window) const {
  if (!window) return 0;
  return std::max(0, *std::min_element(in.positions + rows.begin, in.positions + rows.end) - window + 1);
}

// Returns the pages that a segment's view has in a layer under a head, or null when it has all.
const int32_t* Attention::view_of(int segment, int layer, int head) const {
  const SegmentInput& in = segments_[segment].in;
  return in.view ? in.view + (size_t(layer) * pool_->kv_heads() + head) * in.view_pages : nullptr;
}

// Returns which full pages of a split the rows see, as places in the view, or as pages where there is no view.
RowRun Attention::full_pages(const AttentionLayer& layer, const Piece& piece, int split) const {
  const SegmentInput& in = segments_[piece.segment].in;
  const int visible = first_visible(in, piece.rows, layer.window) / page_size;
  const int32_t* view = view_of(piece.segment, layer.layer, piece.head);
  const int32_t* last = view + in.view_pages;
  if (segment_states_[piece.segment].own) {
    const int begin = visible ? int(std::lower_bound(view, last, visible) - view) : 0;
    return {std::max(split * own_split_pages, begin), std::min((split + 1) * own_split_pages, in.view_pages)};
  }
  const int begin = std::max(split * split_pages, visible), end = std::min((split + 1) * split_pages, in.full);
  if (!view) return {begin, end};
  return {int(std::lower_bound(view, last, begin) - view), int(std::lower_bound(view, last, end) - view)};
}

// Returns the block of a full page. page: absolute.
const char* Attention::full_block(const AttentionLayer& layer, const Piece& piece, int page) const {
  const SegmentInput& in = segments_[piece.segment].in;
  if (copies_) return copies_->block(layer.layer, piece.head, in.pages[page]);
  return pool_->block(layer.layer, piece.head, in.pages[page]);
}

const char* Attention::first_block(const AttentionLayer& layer, const Piece& piece, int split) const {
  const RowRun pages = full_pages(layer, piece, split);
  if (pages.begin >= pages.end) return nullptr;
  const int32_t* view = view_of(piece.segment, layer.layer, piece.head);
  return full_block(layer, piece, view ? view[pages.begin] : pages.begin);
}

void Attention::visit_full_pages(const AttentionLayer& layer, const Piece& piece, int split, const char* behind,
                                 float* states, Scratch& scratch) {
  const SegmentInput& in = segments_[piece.segment].in;
  const int visible = first_visible(in, piece.rows, layer.window);
  const RowRun pages = full_pages(layer, piece, split);
  const int32_t* view = view_of(piece.segment, layer.layer, piece.head);
  const auto absolute = [&](int i) { return view ? view[i] : i; };
  const auto block = [&](int i) { return full_block(layer, piece, absolute(i)); };
  for (int i = pages.begin; i < pages.end; ++i) {
    const int page = absolute(i);
    const char* here = block(i);
    const char* next = i + 1 < pages.end ? block(i + 1) : behind ? behind : here;
    // Lanes before a window must not hold NaN. In a copy they may, because there a weight that is NaN counts as zero.
    if (!copies_ && visible > page * page_size) {
      Slots slots;
      std::iota(slots.begin(), slots.end(), in.pages[page] * page_size);
      here = gather(layer, piece, slots, visible - page * page_size, scratch);
    }
    visit(layer, piece, piece.rows, page, copies_ != nullptr, here, next, states, scratch);
  }
}

// Puts the tokens of these slots into one page. No row sees the lanes before `visible`, and their slots may hold
// anything, NaN included.
const char* Attention::gather(const AttentionLayer& layer, const Piece& piece, Slots slots, int visible,
                              Scratch& scratch) const {
  if (visible > 0) std::fill_n(slots.begin(), visible, -1);
  pool_->gather(layer.layer, piece.head, slots.data(), scratch.page.data());
  return scratch.page.data();
}

void Attention::visit_tail(const AttentionLayer& layer, const Piece& piece, int page, float* states, Scratch& scratch) {
  const SegmentPlan& segment = segments_[piece.segment];
  const int visible = first_visible(segment.in, piece.rows, layer.window) - page * page_size;
  if (visible >= page_size) return;
  for (const TailGroup& group : segment.tail[page - segment.in.full]) {
    const bool direct = group.page >= 0 && visible <= 0;
    const char* block = direct ? pool_->block(layer.layer, piece.head, group.page) : nullptr;
    for (const RowRun& run : group.runs) {
      const RowRun rows{std::max(run.begin, piece.rows.begin), std::min(run.end, piece.rows.end)};
      if (rows.begin >= rows.end) continue;
      if (!block) block = gather(layer, piece, group.slots, visible, scratch);
      visit(layer, piece, rows, page, false, block, block, states, scratch);
    }
  }
}

// Returns whether some row sees only a part of the page, and then writes which lanes each query sees. A page before the
// tail is seen whole unless there is a window.
bool Attention::set_lanes(const SegmentInput& in, RowRun rows, int page, int window, Scratch& scratch) const {
  if (page < in.full && !window) return false;
  bool partial = false;
  for (int row = rows.begin; row < rows.end; ++row) {
    const int offset = in.positions[row] - page * page_size;
    const int first = window ? std::clamp(offset - window + 1, 0, page_size) : 0;
    const int last = std::clamp(offset + 1, 0, page_size);
    std::fill_n(scratch.first.begin() + (row - rows.begin) * group_, group_, first);
    std::fill_n(scratch.last.begin() + (row - rows.begin) * group_, group_, last);
    partial |= first > 0 || last < page_size;
  }
  return partial;
}

// Returns the piece's queries as they meet the keys of a page. Where no row is moved for this page, they are the
// queries at the rows' own positions.
const char* Attention::queries_for(const AttentionLayer& layer, const Piece& piece, int page, bool copied,
                                   Scratch& scratch) const {
  const SegmentInput& in = segments_[piece.segment].in;
  const size_t first = (size_t(piece.head) * rows_ + in.start + piece.rows.begin) * group_;
  const char* own = (copied ? layer.copy_q : layer.q) + first * query_bytes(copied);
  if (!layer.plain) return own;
  const int block = page / rope_.shifts.pages;
  bool moved = false;
  for (int row = piece.rows.begin; row < piece.rows.end; ++row) moved |= rope_.shifts.of(in.positions[row], block) > 0;
  if (!moved) return own;
  if (scratch.block != block || scratch.copied != copied) {
    move_queries(layer, piece, block, copied, scratch.moved.data());
    scratch.block = block;
    scratch.copied = copied;
  }
  return scratch.moved.data();
}

void Attention::move_queries(const AttentionLayer& layer, const Piece& piece, int block, bool copied, char* out) const {
  const SegmentInput& in = segments_[piece.segment].in;
  const RoundOperands round = page_kernels(copied).round;
  const size_t bytes = query_bytes(copied);
  alignas(64) float turned[longest_head] = {};  // zeros after the values
  for (int row = piece.rows.begin; row < piece.rows.end; ++row) {
    const int position = in.positions[row];
    const size_t angles = size_t(position - rope_.shifts.of(position, block)) * (values_ / 2);
    const float* plain = layer.plain + (size_t(piece.head) * rows_ + in.start + row) * group_ * head_dim_;
    for (int g = 0; g < group_; ++g, out += bytes) {
      kernels_.rotate(plain + g * head_dim_, rope_.cos + angles, rope_.sin + angles, values_ / 2, turned);
      round(turned, head_dim_, out);
    }
  }
}

void Attention::visit(const AttentionLayer& layer, const Piece& piece, RowRun rows, int page, bool copied,
                      const char* block, const char* next, float* states, Scratch& scratch) {
  const SegmentInput& in = segments_[piece.segment].in;
  const size_t query = (size_t(piece.head) * rows_ + in.start + rows.begin) * group_;
  PageVisit visit{};
  visit.block = block;
  visit.next = next;
  visit.head_dim = head_dim_;
  visit.scale = float(log2e / std::sqrt(double(values_)) * scale_);
  visit.cap = float(log2e * cap_);
  visit.queries = (rows.end - rows.begin) * group_;
  visit.q = queries_for(layer, piece, page, copied, scratch) +
            size_t(rows.begin - piece.rows.begin) * group_ * query_bytes(copied);
  visit.state = states + size_t(rows.begin - piece.rows.begin) * group_ * state_floats(head_dim_);
  if (set_lanes(in, rows, page, layer.window, scratch)) {
    visit.first = scratch.first.data();
    visit.last = scratch.last.data();
  }
  if (layer.mass) {
    visit.mass = mass_.data() + query * mass_stride_ + page;
    visit.mass_maximum = mass_maximum_.data() + query * mass_stride_ + page;
    visit.mass_stride = mass_stride_;
  }
  page_kernels(copied).visit(visit);
}

// Merges a row's states under one KV head, and makes its output and mass from them.
void Attention::finish(const AttentionLayer& layer, int segment, int row, int head) {
  const size_t pass_row = segments_[segment].in.start + row;
  const size_t stride = state_floats(head_dim_);
  for (int g = 0; g < group_; ++g) {
    float* total = state(segment, 0, head, row) + g * stride;
    for (int part = 1; part < segment_states_[segment].parts(head); ++part) {
      kernels_.merge(total, state(segment, part, head, row) + g * stride, head_dim_);
    }
    const size_t query = ((size_t(head) * rows_) + pass_row) * group_ + g;
    if (layer.mass) {  // of the pages that are kept
      kernels_.add_mass(total, head_dim_, mass_.data() + query * mass_stride_,
                        mass_maximum_.data() + query * mass_stride_, int(mass_stride_),
                        layer.mass + (pass_row * pool_->kv_heads() + head) * mass_stride_);
    }
    const Recall* recall = segments_[segment].in.recall;
    if (recall && !recall->keeps(layer.layer)) recall = nullptr;
    const float* asking = recall ? layer.asking + query * head_dim_ : nullptr;
    if (recall && !recall->shape().gated()) recall->merge(layer.layer, head, asking, total);
    alignas(64) float values[longest_head];
    kernels_.normalise(total, head_dim_, values);
    if (recall && recall->shape().gated()) recall->mix(layer.layer, head * group_ + g, asking, values);
    std::copy_n(values, values_, layer.out + pass_row * layer.out_stride + (size_t(head) * group_ + g) * values_);
  }
}

}  // namespace tokenswift
