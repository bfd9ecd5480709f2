// Statistics of the keys of pages, which the policies ask for, and pages for a memory.
#include <algorithm>

#include "engine/decoder.h"
#include "engine/require.h"

namespace tokenswift {
namespace {

constexpr int piece_pages = 32;

// Calls work(layer, head, first, last) for every (layer, KV head) and every run of the `count` pages.
template <class F>
void share_pages(Team& team, const Pool& pool, int count, const F& work) {
  const int runs = (count + piece_pages - 1) / piece_pages, heads = pool.kv_heads();
  team.run(pool.layers() * heads * runs, [&](int piece, int) {
    const int first = piece % runs * piece_pages;
    work(piece / runs / heads, piece / runs % heads, first, std::min(first + piece_pages, count));
  });
}

}  // namespace

void Decoder::key_bounds(const Pool& pool, const int32_t* pages, int count, int width, float* low, float* high) {
  const std::lock_guard<std::mutex> turn(team_->turn());
  share_pages(*team_, pool, count, [&](int layer, int head, int first, int last) {
    for (int i = first; i < last; ++i) {
      const size_t at = ((size_t(layer) * pool.kv_heads() + head) * pool.pages() + pages[i]) * width;
      pool.key_bounds(layer, head, pages[i], width, low + at, high + at);
    }
  });
}

void Decoder::key_scores(const Pool& pool, const int32_t* pages, int count, const float* queries, float* out) {
  const std::lock_guard<std::mutex> turn(team_->turn());
  const FlushDenormals flush;
  const RestAtEnd rest{kernels_};
  const PageKernels& kernels = kernels_.of(pool.type());
  share_pages(*team_, pool, count, [&](int layer, int head, int first, int last) {
    const size_t at = size_t(layer) * pool.kv_heads() + head;
    alignas(64) float query[longest_head];
    kernels.round(queries + at * pool.head_dim(), pool.head_dim(), query);
    PageVisit visit{};
    visit.head_dim = pool.head_dim();
    visit.q = query;
    for (int i = first; i < last; ++i) {
      visit.block = pool.block(layer, head, pages[i]);
      visit.next = pool.block(layer, head, pages[std::min(i + 1, last - 1)]);
      out[at * count + i] = kernels.best_score(visit);
    }
  });
}

void Decoder::fold(Recall& recall, const Pool& pool, const int32_t* numbers, const int32_t* pages, int count,
                   const RopeTables& rope, const RopeTables& local, int context, const float* shifts) {
  check(recall);
  require((recall.shape().kind == Remembering::linear) == (shifts != nullptr), "only linear has scales of pages");
  std::vector<RopeTables> ropes;
  for (const int of_layer : shape_.ropes) ropes.push_back(of_layer < 0 ? RopeTables{} : of_layer ? local : rope);
  for (int i = 0; i < count; ++i) {
    require(numbers[i] >= 0 && numbers[i] < context / page_size && pool.usable(pages[i]), "page ", numbers[i],
            " is not in use, or past the context");
  }
  recall.fold(*team_, pool, numbers, pages, count, ropes, shifts);
}

void Decoder::page_keys(const Pool& pool, int layer, const int32_t* pages, int count, int width, float* out) {
  const std::lock_guard<std::mutex> turn(team_->turn());
  team_->run(pool.kv_heads() * count, [&](int piece, int) {
    pool.keys(layer, piece / count, pages[piece % count], width, out + size_t(piece) * page_size * width);
  });
}

}  // namespace tokenswift
