// The attention of all rows of a pass over the paged cache.
#pragma once

#include <vector>

#include "isa/kernels.h"
#include "engine/plan.h"
#include "engine/pool.h"
#include "engine/recall.h"
#include "engine/team.h"
#include "engine/page_copies.h"

namespace tokenswift {

// One layer's arguments. Queries are ordered [kv_heads][rows][group], where group = heads / kv_heads.
struct AttentionLayer {
  int layer;
  int window;           // a row at p sees (p - window, p]; with 0 it sees everything before it
  const char* q;        // queries as operands of the pool's page type, [queries][padded head_dim]
  const char* copy_q;   // queries as operands of copies, where copies are read
  const float* plain;   // queries before RoPE, [queries][padded head_dim]; null where no query is moved for far keys
  const float* asking;  // queries as their segments' memories take them, in the same order; read where there is one
  float* out;           // [rows][out_stride], where query head h begins at h * head_dim
  size_t out_stride;
  float* mass;  // [rows][kv_heads][pages]; null when not wanted
};

// A row's keys are visited page by page in ascending order. A split is 16 pages and begins at an absolute multiple
// of 16. Every split has a softmax state, and the states are merged in order. So a row's result depends on its own keys
// alone. It does not depend on the rows beside it, on threads, or on whether splits ran side by side or one after the
// other. A split of which a view holds no page is passed over, because merging a state that has seen nothing changes no
// bit. A view of copies, which only drafts have, has splits of its own: 8 of its pages each, and the tail.
//
// Where queries are moved (BlockShifts), a piece rotates its queries anew when its walk comes to a page of another
// block. It does so once for each row, head and block, except under a view of copies, whose splits may part a block. A
// row's queries depend on its own position and the block alone.
class Attention {
 public:
  // head_dim: values of a head. The pool pads them to vector_multiple. scale: factor on scores beyond head_dim ** -0.5.
  // cap: soft cap of the scaled scores, 0 where there is none.
  Attention(const Kernels& kernels, int heads, int head_dim, double scale, double cap)
      : kernels_(kernels),
        heads_(heads),
        values_(head_dim),
        head_dim_(round_up(head_dim, vector_multiple)),
        scale_(scale),
        cap_(cap) {}

  // Prepares a pass. copies: read instead of full pages, or null to read the pages themselves. mass_pages: pages of the
  // mass that is wanted, a multiple of vector_multiple, or 0 where none is. Pool, copies and tables must outlive the
  // pass.
  void prepare(std::vector<SegmentPlan> segments, const Pool& pool, const PageCopies* copies, const RopeTables& rope,
               int rows, int mass_pages, int threads);

  // Computes one layer of the pass.
  void run(Team& team, const AttentionLayer& layer);

 private:
  // Consecutive rows of one segment that walk the same pages, under one KV head.
  struct Piece {
    int segment, head;
    RowRun rows;    // counted in the segment
    RowRun splits;  // counted among the splits that hold pages
  };

  struct SegmentState {
    bool own;       // whether its splits are a view's own
    bool whole;     // whether a query has one softmax state instead of one for each split that holds pages
    size_t states;  // where the states begin, [parts][kv_heads][rows][group]
    std::vector<std::vector<int>> splits;  // [kv_heads] splits that hold pages, ascending

    int parts(int head) const { return whole ? 1 : int(splits[head].size()); }
  };

  struct Scratch {
    Buffer<char> page;     // a gathered page
    Buffer<float> states;  // states of the current split, where one is kept for all splits
    std::vector<int> first, last;
    Buffer<char> moved;  // operands of a piece's queries as they meet the keys of `block`
    int block = -1;
    bool copied = false;  // whether `moved` holds operands of copies
  };

  void find_splits(int segment, int layer);
  void add_pieces(int segment);
  void run_piece(const AttentionLayer& layer, int index, Scratch& scratch);
  void run_split(const AttentionLayer& layer, const Piece& piece, int split, const char* behind, float* states,
                 Scratch& scratch);
  void visit_full_pages(const AttentionLayer& layer, const Piece& piece, int split, const char* behind, float* states,
                        Scratch& scratch);
  RowRun full_pages(const AttentionLayer& layer, const Piece& piece, int split) const;
  const int32_t* view_of(int segment, int layer, int head) const;
  bool has_own_splits(const SegmentInput& in) const { return copies_ && in.view; }
  const char* full_block(const AttentionLayer& layer, const Piece& piece, int page) const;
  const char* queries_for(const AttentionLayer& layer, const Piece& piece, int page, bool copied,
                          Scratch& scratch) const;
  void move_queries(const AttentionLayer& layer, const Piece& piece, int block, bool copied, char* out) const;
  const PageKernels& page_kernels(bool copied) const { return kernels_.of(copied ? PageType::int8 : pool_->type()); }
  size_t query_bytes(bool copied) const { return page_kernels(copied).query_bytes(head_dim_); }
  const char* first_block(const AttentionLayer& layer, const Piece& piece, int split) const;
  void visit_tail(const AttentionLayer& layer, const Piece& piece, int page, float* states, Scratch& scratch);
  void visit(const AttentionLayer& layer, const Piece& piece, RowRun rows, int page, bool copied, const char* block,
             const char* next, float* states, Scratch& scratch);
  void finish(const AttentionLayer& layer, int segment, int row, int head);
  const char* gather(const AttentionLayer& layer, const Piece& piece, Slots slots, int visible, Scratch& scratch) const;
  bool set_lanes(const SegmentInput& in, RowRun rows, int page, int window, Scratch& scratch) const;
  int first_visible(const SegmentInput& in, RowRun rows, int window) const;
  float* state(int segment, int part, int head, int row);

  const Kernels& kernels_;
  int heads_, values_, head_dim_;  // head_dim_ is padded
  double scale_, cap_;
  int group_ = 1, rows_ = 0, threads_ = 1;
  bool views_ = false;  // whether layers differ in the pages they visit
  size_t mass_stride_ = 0;
  const Pool* pool_ = nullptr;
  const PageCopies* copies_ = nullptr;
  RopeTables rope_;
  std::vector<SegmentPlan> segments_;
  std::vector<SegmentState> segment_states_;
  std::vector<Piece> pieces_;
  std::vector<Scratch> scratch_;
  Buffer<float> states_, mass_, mass_maximum_;
};

}  // namespace tokenswift
