// Pages of keys and values, laid out as the dot products read them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "isa/kernels.h"
#include "engine/memory.h"

namespace tokenswift {

class PageCopies;

// A page holds 64 tokens. A block is what it holds of one (layer, KV head): keys [head_dim / step][64][step], values
// [64 / step][head_dim][step], step 2 for bf16 and int8, 1 for fp32; then, for int8, what the quants of each token are
// to be multiplied with, fp32: [64] for keys, [64] for values. Pages come in slabs; within a slab a (layer, KV head)
// has its blocks side by side. A slot is page * 64 + lane.
class Pool {
 public:
  Pool(int layers, int kv_heads, int head_dim, PageType type, int pages);
  Pool(const Pool&) = delete;
  ~Pool();

  int layers() const { return layers_; }
  int kv_heads() const { return kv_heads_; }
  int head_dim() const { return head_dim_; }
  PageType type() const { return type_; }
  int pages() const { return pages_; }
  size_t page_bytes() const { return size_t(layers_) * kv_heads_ * block_bytes(); }
  size_t block_bytes() const { return block_bytes(type_, head_dim_); }
  static size_t block_bytes(PageType type, int head_dim);
  // Of the pages that drafts read, made when first asked for; null unless the pool holds bf16, which they are made
  // from.
  PageCopies* copies();
  // The copy of a block, block_bytes(int8); null where there is none.
  char* copy_of(int layer, int head, int page) const;

  // Makes a page usable, its slab with it; nothing is copied. Throws std::bad_alloc, std::out_of_range.
  void reserve(int page);
  bool usable(int page) const { return page >= 0 && page < pages_ && bool(slabs_[page / slab_pages_]); }
  bool usable_slot(int slot) const { return slot >= 0 && usable(slot / page_size); }

  char* block(int layer, int head, int page) const {
    const size_t at = (size_t(layer) * kv_heads_ + head) * slab_pages_ + page % slab_pages_;
    return slabs_[page / slab_pages_].data() + at * block_bytes();
  }

  // k, v: [head_dim], rounded to the pool's type.
  void write(int layer, int head, int slot, const float* k, const float* v);

  // Copies all layers and heads of slots, as if all were read before any is written. Throws std::out_of_range.
  void move(const int32_t* source, const int32_t* target, int count);

  // Puts the tokens of 64 slots side by side in `out` (block_bytes()); where the slot is -1 the value is zero, and the
  // key whatever it may be.
  void gather(int layer, int head, const int32_t* slots, char* out) const;

  // The least and the greatest of a page's keys in each of the first `count` dimensions.
  void key_bounds(int layer, int head, int page, int count, float* low, float* high) const;

 private:
  size_t values_at() const;  // bytes from a block's beginning

  int layers_, kv_heads_, head_dim_;
  PageType type_;
  int pages_, slab_pages_;
  std::vector<Mapping> slabs_;
  std::unique_ptr<PageCopies> copies_;
};

}  // namespace tokenswift
