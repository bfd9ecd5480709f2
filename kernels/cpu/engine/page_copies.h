// Byte copies of the pages that drafts read.
#pragma once

#include <cstdint>
#include <vector>

#include "isa/kernels.h"
#include "engine/memory.h"
#include "engine/plan.h"
#include "engine/team.h"

namespace tokenswift {

// Copies pages as bytes (page_bytes.h), which are half as large. Every pass of a draft reads its view, whose pages
// change little from draft to draft, and a draft may be wrong. Each (layer, KV head) has room for a quarter more than
// its view. A copy that is in no view any more is replaced when room is needed. A copy stays valid until its page is
// reserved anew, because a full page does not change.
class PageCopies {
 public:
  explicit PageCopies(const Pool& pool) : pool_(pool), place_(lists() * pool.pages(), -1) {}

  // Copies the full pages that these segments see and that have no copy yet. The segments were checked before.
  void update(Team& team, const Kernels& kernels, const std::vector<SegmentPlan>& segments);

  // Returns the copy of a page that the latest update was for.
  char* block(int layer, int head, int page) const {
    const size_t list = size_t(layer) * pool_.kv_heads() + head;
    return at(list, place_[list * pool_.pages() + page]);
  }

  bool has(int layer, int head, int page) const {
    return place_[(size_t(layer) * pool_.kv_heads() + head) * pool_.pages() + page] >= 0;
  }

  void forget(int page) {
    for (size_t list = 0; list < lists(); ++list) place_[list * pool_.pages() + page] = -1;
  }

 private:
  struct Copy {
    int32_t page = -1;
    uint32_t used = 0;  // number of the latest update that was for it
  };

  size_t lists() const { return size_t(pool_.layers()) * pool_.kv_heads(); }
  size_t block_bytes() const { return Pool::block_bytes(PageType::int8, pool_.head_dim()); }
  char* at(size_t list, int place) const { return data_.data() + (list * room_ + place) * block_bytes(); }
  void make_room(int pages);
  void update_list(int list, const Kernels& kernels, const std::vector<SegmentPlan>& segments);

  const Pool& pool_;
  int room_ = 0;  // copies that a list has room for
  uint32_t now_ = 0;
  std::vector<int32_t> place_;  // [lists][pages of the pool], -1 where there is none
  std::vector<Copy> copies_;    // [lists][room]
  std::vector<int> hand_;       // [lists] where the search for a copy to replace goes on
  Mapping data_;
};

}  // namespace tokenswift
