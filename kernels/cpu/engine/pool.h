// Pages of keys and values, in the layout that the dot products read.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "isa/kernels.h"
#include "engine/memory.h"

namespace tokenswift {

class PageCopies;

// A page holds 64 tokens. A block is the part of a page for one (layer, KV head): keys [head_dim / step][64][step],
// then values [64 / step][head_dim][step], where step is 4 for int8, 2 for bf16, and 1 for fp32. A block of int8 has
// its own order of tokens and ends with their fp32 scales, by which its quants are multiplied (page_bytes.h). Pages
// come in slabs. Within a slab the blocks of a (layer, KV head) lie side by side. A slot is page * 64 + lane.
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
  // Returns the copies of the pages that drafts read, made at the first call. They are made from bf16, so the result is
  // null for a pool of another type.
  PageCopies* copies();
  // Returns the copy of a block, of block_bytes(int8), or null where there is none.
  char* copy_of(int layer, int head, int page) const;

  // Makes a page usable, and with it its slab. Nothing is copied. Throws std::bad_alloc and std::invalid_argument.
  void reserve(int page);
  bool usable(int page) const { return page >= 0 && page < pages_ && bool(slabs_[page / slab_pages_]); }
  bool usable_slot(int slot) const { return slot >= 0 && usable(slot / page_size); }

  char* block(int layer, int head, int page) const {
    const size_t at = (size_t(layer) * kv_heads_ + head) * slab_pages_ + page % slab_pages_;
    return slabs_[page / slab_pages_].data() + at * block_bytes();
  }

  // Writes k and v, [head_dim] each, rounded to the pool's type.
  void write(int layer, int head, int slot, const float* k, const float* v);

  // Copies all layers and heads of slots, with the result of reading all before writing any. Throws
  // std::invalid_argument.
  void move(const int32_t* source, const int32_t* target, int count);

  // Puts the tokens of 64 slots side by side into the block `out`, of block_bytes(). Where a slot is -1 the value is
  // zero and the key is undefined.
  void gather(int layer, int head, const int32_t* slots, char* out) const;

  // Finds the least and the greatest of a page's keys in each of the first `count` dimensions.
  void key_bounds(int layer, int head, int page, int count, float* low, float* high) const;

  // Widens a page's keys, the first `count` dimensions of each, into out [page_size][count].
  void keys(int layer, int head, int page, int count, float* out) const;
  void values(int layer, int head, int page, int count, float* out) const;  // the same of its values

 private:
  size_t values_at() const;  // place of the values in a block, in bytes

  int layers_, kv_heads_, head_dim_;
  PageType type_;
  int pages_, slab_pages_;
  std::vector<Mapping> slabs_;
  std::unique_ptr<PageCopies> copies_;
};

}  // namespace tokenswift
