// Copies of the pages that drafts read, as bytes.
#pragma once

#include <cstdint>
#include <vector>

#include "isa/kernels.h"
#include "engine/memory.h"
#include "engine/plan.h"
#include "engine/team.h"

namespace tokenswift {

// A view is read again and again, by every pass of a draft, and its pages change little from draft to draft. As bytes
// (page_bytes.h) they are half as large, and a draft may be wrong. Each (layer, KV head) has room for a quarter more
// than its view; what is in no view any more goes when there is need. A copy stands for its page until that is reserved
// anew, for a full page does not change.
class PageCopies {
 public:
  explicit PageCopies(const Pool& pool) : pool_(pool), place_(lists() * pool.pages(), -1) {}

  // Copies what is missing of the full pages that these segments see; they were checked before.
  void update(Team& team, const Kernels& kernels, const std::vector<SegmentPlan>& segments);

  // Of a page that the latest update was for.
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
    uint32_t used = 0;  // the latest update that was for it
  };

  size_t lists() const { return size_t(pool_.layers()) * pool_.kv_heads(); }
  size_t block_bytes() const { return Pool::block_bytes(PageType::int8, pool_.head_dim()); }
  char* at(size_t list, int place) const { return data_.data() + (list * room_ + place) * block_bytes(); }
  void make_room(int pages);
  void update_list(int list, const Kernels& kernels, const std::vector<SegmentPlan>& segments);

  const Pool& pool_;
  int room_ = 0;  // copies of a list
  uint32_t now_ = 0;
  std::vector<int32_t> place_;  // [lists][pages of the pool], -1 where there is none
  std::vector<Copy> copies_;    // [lists][room]
  std::vector<int> hand_;       // [lists] where a copy that may go was last found
  Mapping data_;
};

}  // namespace tokenswift
