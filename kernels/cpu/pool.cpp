#include "pool.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "bf16.h"

namespace tokenswift {
namespace {

// Big enough for large pages of the system, small enough to waste little at the end.
constexpr size_t slab_bytes = size_t(48) << 20;

// One token in a block, as a lane of its page.
class Lane {
 public:
  Lane(char* block, int lane, int head_dim, Element element)
      : keys_(block + lane * key_bytes), head_dim_(head_dim), step_(step_of(element)), size_(bytes_of(element)) {
    values_ = block + (size_t(page_size) * head_dim + size_t(lane / step_) * head_dim * step_ + lane % step_) * size_;
  }

  void write(const float* k, const float* v) const {
    if (step_ == 1) {
      for (int d = 0; d < head_dim_; ++d) std::memcpy(key(d), k + d, size_);
      std::memcpy(values_, v, head_dim_ * size_);
    } else {
      for (int d = 0; d < head_dim_; d += 2) {
        const uint16_t pair[2] = {to_bf16(k[d]), to_bf16(k[d + 1])};
        std::memcpy(key(d / 2), pair, key_bytes);
      }
      for (int d = 0; d < head_dim_; ++d) {
        const uint16_t value = to_bf16(v[d]);
        std::memcpy(value_at(d), &value, size_);
      }
    }
  }

  void copy_from(const Lane& source) const {
    for (int d = 0; d < head_dim_ / step_; ++d) std::memcpy(key(d), source.key(d), key_bytes);
    if (step_ == 1) {
      std::memcpy(values_, source.values_, head_dim_ * size_);
    } else {
      for (int d = 0; d < head_dim_; ++d) std::memcpy(value_at(d), source.value_at(d), sizeof(uint16_t));
    }
  }

  void clear_value() const {
    for (int d = 0; d < head_dim_; ++d) std::memset(value_at(d), 0, size_);
  }

 private:
  static constexpr size_t key_bytes = 4;  // a step of one key: two bf16 or one fp32

  char* key(int step) const { return keys_ + size_t(step) * page_size * key_bytes; }
  char* value_at(int d) const { return values_ + size_t(d) * step_ * size_; }

  char* keys_;
  char* values_;
  int head_dim_, step_;
  size_t size_;
};

}  // namespace

Pool::Pool(int layers, int kv_heads, int head_dim, Element element, int pages)
    : layers_(layers), kv_heads_(kv_heads), head_dim_(head_dim), element_(element), pages_(pages) {
  slab_pages_ = std::min(int(std::clamp<size_t>(slab_bytes / page_bytes(), 1, 1024)), pages);
  slabs_.resize((pages + slab_pages_ - 1) / slab_pages_);
}

void Pool::reserve(int page) {
  if (page < 0 || page >= pages_) {
    throw std::out_of_range("page " + std::to_string(page) + " of " + std::to_string(pages_));
  }
  Mapping& slab = slabs_[page / slab_pages_];
  if (!slab) slab = Mapping(slab_pages_ * page_bytes());
}

void Pool::write(int layer, int head, int slot, const float* k, const float* v) {
  Lane(block(layer, head, slot / page_size), slot % page_size, head_dim_, element_).write(k, v);
}

void Pool::move(const int32_t* source, const int32_t* target, int count) {
  for (int i = 0; i < count; ++i) {
    for (const int slot : {source[i], target[i]}) {
      if (usable_slot(slot)) continue;
      throw std::out_of_range("slot " + std::to_string(slot) + " lies in no page that is in use");
    }
  }
  const int staged = (count + page_size - 1) / page_size;
  Buffer<char> stage(staged * block_bytes());
  const auto lane = [&](int layer, int head, int slot) {
    return Lane(block(layer, head, slot / page_size), slot % page_size, head_dim_, element_);
  };
  const auto staging = [&](int i) {
    return Lane(stage.data() + i / page_size * block_bytes(), i % page_size, head_dim_, element_);
  };
  for (int layer = 0; layer < layers_; ++layer) {
    for (int head = 0; head < kv_heads_; ++head) {
      for (int i = 0; i < count; ++i) staging(i).copy_from(lane(layer, head, source[i]));
      for (int i = 0; i < count; ++i) lane(layer, head, target[i]).copy_from(staging(i));
    }
  }
}

void Pool::gather(int layer, int head, const int32_t* slots, char* out) const {
  // Most lanes of a partial page stand where they belong already: copy the page, then put the others right.
  const int page = slots[0] >= 0 ? slots[0] / page_size : 0;
  int in_place = 0;
  for (int i = 0; i < page_size; ++i) in_place += slots[i] == page * page_size + i;
  const bool whole = in_place >= page_size / 4;
  if (whole) std::memcpy(out, block(layer, head, page), block_bytes());
  else std::memset(out + half_bytes(), 0, half_bytes());
  for (int i = 0; i < page_size; ++i) {
    const Lane lane(out, i, head_dim_, element_);
    if (slots[i] < 0) {
      if (whole) lane.clear_value();
    } else if (!whole || slots[i] != page * page_size + i) {
      lane.copy_from(Lane(block(layer, head, slots[i] / page_size), slots[i] % page_size, head_dim_, element_));
    }
  }
}

}  // namespace tokenswift
