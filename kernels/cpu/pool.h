// Pages of keys and values, laid out as the dot products read them.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "memory.h"

namespace tokenswift {

// A page holds 64 tokens of every (layer, KV head): keys [head_dim / step][64][step], then values
// [64 / step][head_dim][step]. Pages come in slabs; within a slab a (layer, KV head) has its pages side by side.
// A slot is page * 64 + lane.
class Pool {
 public:
  Pool(int layers, int kv_heads, int head_dim, Element element, int pages);
  Pool(const Pool&) = delete;

  int layers() const { return layers_; }
  int kv_heads() const { return kv_heads_; }
  int head_dim() const { return head_dim_; }
  Element element() const { return element_; }
  int pages() const { return pages_; }
  // All layers and heads of a page.
  size_t page_bytes() const { return size_t(layers_) * kv_heads_ * block_bytes(); }
  // One (layer, head) of a page: keys and values.
  size_t block_bytes() const { return 2 * half_bytes(); }
  size_t half_bytes() const { return size_t(page_size) * head_dim_ * bytes_of(element_); }

  // Makes a page usable, its slab with it; nothing is copied. Throws std::bad_alloc, std::out_of_range.
  void reserve(int page);
  bool usable(int page) const { return page >= 0 && page < pages_ && bool(slabs_[page / slab_pages_]); }
  bool usable_slot(int slot) const { return slot >= 0 && usable(slot / page_size); }

  // Keys of a (layer, head) of a page; its values lie half_bytes() behind.
  char* block(int layer, int head, int page) const {
    const size_t at = (size_t(layer) * kv_heads_ + head) * slab_pages_ + page % slab_pages_;
    return slabs_[page / slab_pages_].data() + at * block_bytes();
  }

  // k, v: [head_dim], rounded to the pool's element type.
  void write(int layer, int head, int slot, const float* k, const float* v);

  // Copies all layers and heads of slots, as if all were read before any is written. Throws std::out_of_range.
  void move(const int32_t* source, const int32_t* target, int count);

  // Puts the tokens of 64 slots side by side in `out` (block_bytes()); where the slot is -1 the value is zero, and the
  // key whatever it may be.
  void gather(int layer, int head, const int32_t* slots, char* out) const;

 private:
  int layers_, kv_heads_, head_dim_;
  Element element_;
  int pages_, slab_pages_;
  std::vector<Mapping> slabs_;
};

}  // namespace tokenswift
