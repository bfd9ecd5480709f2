#include "engine/page_copies.h"

#include <algorithm>

namespace tokenswift {
namespace {

int seen(const SegmentInput& in) { return in.view ? in.view_pages : in.full; }

// Calls f(page of the pool) for every full page of a list that these segments see.
template <class F>
void each_page(const std::vector<SegmentPlan>& segments, int list, const F& f) {
  for (const SegmentPlan& segment : segments) {
    const SegmentInput& in = segment.in;
    const int32_t* view = in.view ? in.view + size_t(list) * in.view_pages : nullptr;
    for (int i = 0; i < seen(in); ++i) f(in.pages[view ? view[i] : i]);
  }
}

}  // namespace

void PageCopies::update(Team& team, const Kernels& kernels, const std::vector<SegmentPlan>& segments) {
  int wanted = 0;
  for (const SegmentPlan& segment : segments) wanted += seen(segment.in);
  if (wanted == 0) return;
  if (wanted + wanted / 4 > room_) make_room(wanted + wanted / 4);
  ++now_;
  team.run(int(lists()), [&](int list, int) { update_list(list, kernels, segments); });
}

void PageCopies::make_room(int pages) {
  data_ = Mapping();  // given back first, so that the old and the new memory are never held at once
  room_ = 0;
  std::fill(place_.begin(), place_.end(), -1);
  data_ = Mapping(lists() * pages * block_bytes());
  copies_.assign(lists() * pages, {});
  hand_.assign(lists(), 0);
  room_ = pages;
}

void PageCopies::update_list(int list, const Kernels& kernels, const std::vector<SegmentPlan>& segments) {
  int32_t* place = place_.data() + size_t(list) * pool_.pages();
  Copy* copies = copies_.data() + size_t(list) * room_;
  each_page(segments, list, [&](int page) {
    if (place[page] >= 0) copies[place[page]].used = now_;
  });
  int& hand = hand_[list];
  each_page(segments, list, [&](int page) {
    if (place[page] >= 0) return;
    while (copies[hand].used == now_) hand = (hand + 1) % room_;
    Copy& copy = copies[hand];
    if (copy.page >= 0 && place[copy.page] == hand) place[copy.page] = -1;
    const char* block = pool_.block(list / pool_.kv_heads(), list % pool_.kv_heads(), page);
    kernels.copy_page(block, pool_.head_dim(), at(list, hand));
    copy = {page, now_};
    place[page] = hand;
  });
}

}  // namespace tokenswift
