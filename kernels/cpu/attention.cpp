#include "attention.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace tokenswift {
namespace {

constexpr int split_pages = 16;    // part of the numerics contract
constexpr int block_queries = 48;  // queries whose states stay in the first-level cache beside a page

int rows_a_block(int group) { return std::max(1, block_queries / group); }

}  // namespace

void Attention::prepare(std::vector<SegmentPlan> segments, const Pool& pool, int rows, int mass_pages, int threads) {
  segments_ = std::move(segments);
  pool_ = &pool;
  rows_ = rows;
  group_ = heads_ / pool.kv_heads();
  mass_stride_ = mass_pages;
  pieces_.clear();
  segment_states_.clear();
  for (size_t i = 0; i < segments_.size(); ++i) add_pieces(int(i), threads);
  const size_t queries = size_t(rows) * heads_;
  size_t states = 0;
  for (size_t i = 0; i < segments_.size(); ++i) {
    segment_states_[i].states = states;
    states += size_t(segment_states_[i].parts) * segments_[i].in.rows * heads_ * state_floats(head_dim_);
  }
  states_.reserve(states);
  mass_.reserve(queries * mass_stride_);
  mass_maximum_.reserve(queries * mass_stride_);
  scratch_.resize(threads);
  for (Scratch& scratch : scratch_) {
    const size_t block = size_t(rows_a_block(group_)) * group_;
    scratch.page.reserve(pool.block_bytes());
    scratch.copy.reserve(pool.copy_bytes());
    scratch.states.reserve(block * state_floats(head_dim_));
    scratch.first.resize(block);
    scratch.last.resize(block);
  }
}

// With blocks of rows enough for all threads, each walks all its splits and merges as it goes; else the splits are
// shared out too, several to a piece where a view leaves them almost empty.
void Attention::add_pieces(int segment, int threads) {
  const SegmentInput& in = segments_[segment].in;
  const int splits = segments_[segment].last_page / split_pages + 1;
  const int block = rows_a_block(group_), blocks = (in.rows + block - 1) / block;
  const bool whole = splits == 1 || blocks * pool_->kv_heads() >= 6 * threads;
  const int pages = in.view ? std::max(1, in.view_pages) : in.full + 1;
  const int share = whole ? splits : std::clamp(splits * split_pages / pages, 1, splits);
  for (int head = 0; head < pool_->kv_heads(); ++head) {
    for (int split = 0; split < splits; split += share) {
      for (int row = 0; row < in.rows; row += block) {
        const RowRun rows{row, std::min(row + block, in.rows)}, shared{split, std::min(split + share, splits)};
        pieces_.push_back({segment, head, rows, shared});
      }
    }
  }
  segment_states_.push_back({whole ? 1 : splits, 0});
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
  team.run(int(pieces_.size()), [&](int piece, int worker) { run_piece(layer, pieces_[piece], scratch_[worker]); });
  for (size_t i = 0; i < segments_.size(); ++i) {
    const int rows = segments_[i].in.rows, kv_heads = pool_->kv_heads();
    const size_t cost = size_t(rows) * heads_ * (segment_states_[i].parts * head_dim_ + mass_stride_);
    team.run(rows * kv_heads, cost, [&](int piece, int) { finish(layer, int(i), piece / kv_heads, piece % kv_heads); });
  }
}

void Attention::run_piece(const AttentionLayer& layer, const Piece& piece, Scratch& scratch) {
  const int queries = (piece.rows.end - piece.rows.begin) * group_;
  const size_t stride = state_floats(head_dim_);
  if (segment_states_[piece.segment].parts > 1) {
    for (int split = piece.splits.begin; split < piece.splits.end; ++split) {
      run_split(layer, piece, split, state(piece.segment, split, piece.head, piece.rows.begin), scratch);
    }
    return;
  }
  float* total = state(piece.segment, 0, piece.head, piece.rows.begin);
  run_split(layer, piece, piece.splits.begin, total, scratch);
  for (int split = piece.splits.begin + 1; split < piece.splits.end; ++split) {
    run_split(layer, piece, split, scratch.states.data(), scratch);
    for (int query = 0; query < queries; ++query) {
      kernels_.merge(total + query * stride, scratch.states.data() + query * stride, head_dim_);
    }
  }
}

void Attention::run_split(const AttentionLayer& layer, const Piece& piece, int split, float* states, Scratch& scratch) {
  const int queries = (piece.rows.end - piece.rows.begin) * group_;
  const SegmentPlan& segment = segments_[piece.segment];
  for (int query = 0; query < queries; ++query) {
    float* state = states + size_t(query) * state_floats(head_dim_);
    std::fill_n(state, head_dim_ + sums_width, 0.0f);
    state[state_maximum(head_dim_)] = no_maximum;
  }
  visit_full_pages(layer, piece, split, states, scratch);
  const int begin = std::max(split * split_pages, segment.in.full);
  const int end = std::min((split + 1) * split_pages, segment.last_page + 1);
  for (int page = begin; page < end; ++page) visit_tail(layer, piece, page, states, scratch);
}

int Attention::first_visible(const SegmentInput& in, RowRun rows, int window) const {
  if (!window) return 0;
  return std::max(0, *std::min_element(in.positions + rows.begin, in.positions + rows.end) - window + 1);
}

void Attention::visit_full_pages(const AttentionLayer& layer, const Piece& piece, int split, float* states,
                                 Scratch& scratch) {
  const SegmentInput& in = segments_[piece.segment].in;
  const int visible = first_visible(in, piece.rows, layer.window);
  int begin = std::max(split * split_pages, visible / page_size);
  int end = std::min((split + 1) * split_pages, in.full);
  const int32_t* view = nullptr;  // what `begin` and `end` count; null when they are the pages themselves
  if (in.view) {
    view = in.view + (size_t(layer.layer) * pool_->kv_heads() + piece.head) * in.view_pages;
    begin = int(std::lower_bound(view, view + in.view_pages, begin) - view);
    end = int(std::lower_bound(view, view + in.view_pages, end) - view);
  }
  const auto absolute = [&](int i) { return view ? view[i] : i; };
  const auto block = [&](int i) { return pool_->block(layer.layer, piece.head, in.pages[absolute(i)]); };
  for (int i = begin; i < end; ++i) {
    const int page = absolute(i);
    const char* here = block(i);
    if (visible > page * page_size) {
      Slots slots;
      std::iota(slots.begin(), slots.end(), in.pages[page] * page_size);
      here = gather(layer, piece, slots, visible - page * page_size, scratch);
    }
    visit(layer, piece, piece.rows, page, here, i + 1 < end ? block(i + 1) : here, states, scratch);
  }
}

// The tokens of these slots as one page. Lanes before `visible` are seen by no row and may hold anything, NaN included.
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
      visit(layer, piece, rows, page, block, block, states, scratch);
    }
  }
}

// Whether some row does not see all of the page; then which lanes each query sees.
bool Attention::set_lanes(const SegmentInput& in, RowRun rows, int page, int window, Scratch& scratch) const {
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

void Attention::visit(const AttentionLayer& layer, const Piece& piece, RowRun rows, int page, const char* block,
                      const char* next, float* states, Scratch& scratch) {
  const SegmentInput& in = segments_[piece.segment].in;
  const PageKernels& kernels = kernels_.of(pool_->type());
  const size_t query = (size_t(piece.head) * rows_ + in.start + rows.begin) * group_;
  PageVisit visit{};
  visit.block = block;
  visit.next = next;
  visit.copy = scratch.copy.data();
  visit.head_dim = head_dim_;
  visit.scale = float(1.4426950408889634 / std::sqrt(double(values_)));
  visit.queries = (rows.end - rows.begin) * group_;
  visit.q = layer.q + query * head_dim_ * kernels.operand_bytes;
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
  kernels.visit(visit);
}

// Merges a row's states under one KV head, and turns them into its output and mass.
void Attention::finish(const AttentionLayer& layer, int segment, int row, int head) {
  const size_t pass_row = segments_[segment].in.start + row;
  const size_t stride = state_floats(head_dim_);
  for (int g = 0; g < group_; ++g) {
    float* total = state(segment, 0, head, row) + g * stride;
    for (int part = 1; part < segment_states_[segment].parts; ++part) {
      kernels_.merge(total, state(segment, part, head, row) + g * stride, head_dim_);
    }
    alignas(64) float values[longest_head];
    kernels_.normalise(total, head_dim_, values);
    std::copy_n(values, values_, layer.out + pass_row * layer.out_stride + (size_t(head) * group_ + g) * values_);
    if (layer.mass) {
      const size_t query = ((size_t(head) * rows_) + pass_row) * group_ + g;
      kernels_.add_mass(total, head_dim_, mass_.data() + query * mass_stride_,
                        mass_maximum_.data() + query * mass_stride_, int(mass_stride_),
                        layer.mass + (pass_row * pool_->kv_heads() + head) * mass_stride_);
    }
  }
}

}  // namespace tokenswift
