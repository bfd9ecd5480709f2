#include "engine/pool.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/require.h"
#include "math/bf16.h"
#include "math/half.h"
#include "math/narrow.h"
#include "engine/page_copies.h"

namespace tokenswift {
namespace {

// The bytes of a slab. It is large enough for the system's large pages, and small enough to waste little at the end.
constexpr size_t slab_bytes = size_t(48) << 20;

// The rounding of a head's values to elements of a page. Readers multiply all of them with one scale. step: elements of
// a token's key that lie side by side. key: an element as it lies among the keys, and back. value_at: the place of a
// token's value among those of a dimension.
template <class T>
struct Rounding {
  static constexpr int step = 1;
  static constexpr bool scaled = false;
  Rounding(const float*, int) {}
  T operator()(float x) const { return x; }
  static T key(T x) { return x; }
  static int value_at(int token) { return token; }
  static float widen(T x) { return x; }
};

template <>
struct Rounding<uint16_t> {
  static constexpr int step = 2;
  static constexpr bool scaled = false;
  Rounding(const float*, int) {}
  uint16_t operator()(float x) const { return to_bf16(x); }
  static uint16_t key(uint16_t x) { return x; }
  static int value_at(int token) { return token; }
  static float widen(uint16_t x) { return to_float(x); }
};

// The largest magnitude becomes 127, the others the nearest whole number, ties to even. Where the scale would be
// denormal all values become zero. Where a value is infinite or NaN, the scale is infinite, and no result computed from
// it is finite.
template <>
struct Rounding<int8_t> {
  static constexpr int step = 4;
  static constexpr bool scaled = true;

  Rounding(const float* x, int count) {
    float top = 0.0f;
    for (int i = 0; i < count; ++i) {
      const float size = std::fabs(x[i]);
      top = size > top ? size : size != size ? INFINITY : top;
    }
    by_ = quantum(top);
  }
  int8_t operator()(float x) const {
    return by_.divisor == INFINITY ? int8_t(0) : int8_t(int(x / by_.divisor + rounding_bias - rounding_bias));
  }
  static int8_t key(int8_t x) { return int8_t(x ^ -128); }  // keys lie as unsigned bytes, 128 larger
  static int value_at(int token) { return value_place(token); }
  static float widen(int8_t x) { return x; }

  float scale() const { return by_.scale; }

 private:
  Quantum by_;
};

// One lane of a block: the key, the value and the scales of one token.
template <class T>
class Lane {
 public:
  Lane(char* block, int lane, int head_dim)
      : keys_(reinterpret_cast<T*>(block) + lane * step),
        values_(reinterpret_cast<T*>(block) + page_size * head_dim + place(lane) / step * head_dim * step +
                place(lane) % step),
        scales_(reinterpret_cast<float*>(block + 2 * page_size * head_dim * sizeof(T)) + lane),
        head_dim_(head_dim) {}

  void write(const float* k, const float* v) const {
    const Rounding<T> key_rounding(k, head_dim_), value_rounding(v, head_dim_);
    for (int d = 0; d < head_dim_; ++d) key(d) = Rounding<T>::key(key_rounding(k[d]));
    for (int d = 0; d < head_dim_; ++d) value(d) = value_rounding(v[d]);
    if constexpr (Rounding<T>::scaled) {
      key_scale() = key_rounding.scale();
      value_scale() = value_rounding.scale();
    }
  }

  void copy_from(const Lane& source) const {
    for (int d = 0; d < head_dim_; ++d) key(d) = source.key(d);
    for (int d = 0; d < head_dim_; ++d) value(d) = source.value(d);
    if constexpr (Rounding<T>::scaled) {
      key_scale() = source.key_scale();
      value_scale() = source.value_scale();
    }
  }

  void clear_value() const {
    for (int d = 0; d < head_dim_; ++d) value(d) = 0;
    if constexpr (Rounding<T>::scaled) value_scale() = 0.0f;
  }

  void widen_key(int count, float* out) const {
    for (int d = 0; d < count; ++d) {
      out[d] = Rounding<T>::widen(Rounding<T>::key(key(d)));
      if constexpr (Rounding<T>::scaled) out[d] *= key_scale();
    }
  }

  void widen_value(int count, float* out) const {
    for (int d = 0; d < count; ++d) {
      out[d] = Rounding<T>::widen(value(d));
      if constexpr (Rounding<T>::scaled) out[d] *= value_scale();
    }
  }

  // Bounds all keys of the page whose first lane this is.
  void key_bounds(int count, float* low, float* high) const {
    constexpr int width = 16;
    for (int d = 0; d < count; ++d) {
      const T* keys = &key(d);
      float least[width], greatest[width];
      std::fill_n(least, width, INFINITY);
      std::fill_n(greatest, width, -INFINITY);
      for (int lane = 0; lane < page_size; lane += width) {
        for (int i = 0; i < width; ++i) {
          float x = Rounding<T>::widen(Rounding<T>::key(keys[(lane + i) * step]));
          if constexpr (Rounding<T>::scaled) x *= scales_[lane + i];
          least[i] = x < least[i] ? x : least[i];
          greatest[i] = x > greatest[i] ? x : greatest[i];
        }
      }
      low[d] = *std::min_element(least, least + width);
      high[d] = *std::max_element(greatest, greatest + width);
    }
  }

 private:
  static constexpr int step = Rounding<T>::step;
  static int place(int lane) { return Rounding<T>::value_at(lane); }

  T& key(int d) const { return keys_[size_t(d / step) * page_size * step + d % step]; }
  T& value(int d) const { return values_[d * step]; }
  float& key_scale() const { return scales_[0]; }
  float& value_scale() const { return scales_[page_size]; }

  T* keys_;
  T* values_;
  float* scales_;
  int head_dim_;
};

// Calls f(lane_of), where lane_of(block, lane, head_dim) makes the Lane for this type of page.
template <class F>
void with_lanes(PageType type, const F& f) {
  switch (type) {
    case PageType::bf16:
      return f([](auto... place) { return Lane<uint16_t>(place...); });
    case PageType::f32:
      return f([](auto... place) { return Lane<float>(place...); });
    case PageType::int8:
      return f([](auto... place) { return Lane<int8_t>(place...); });
  }
}

size_t bytes_of(PageType type) { return type == PageType::int8 ? 1 : type == PageType::bf16 ? 2 : 4; }

}  // namespace

Pool::Pool(int layers, int kv_heads, int head_dim, PageType type, int pages)
    : layers_(layers), kv_heads_(kv_heads), head_dim_(head_dim), type_(type), pages_(pages) {
  slab_pages_ = std::min(int(std::clamp<size_t>(slab_bytes / page_bytes(), 1, 1024)), pages);
  slabs_.resize((pages + slab_pages_ - 1) / slab_pages_);
}

Pool::~Pool() = default;

size_t Pool::block_bytes(PageType type, int head_dim) {
  const size_t scales = type == PageType::int8 ? 2 * page_size * sizeof(float) : 0;
  return 2 * page_size * head_dim * bytes_of(type) + scales;
}

PageCopies* Pool::copies() {
  if (type_ == PageType::bf16 && !copies_) copies_ = std::make_unique<PageCopies>(*this);
  return copies_.get();
}

size_t Pool::values_at() const { return page_size * head_dim_ * bytes_of(type_); }

char* Pool::copy_of(int layer, int head, int page) const {
  return copies_ && copies_->has(layer, head, page) ? copies_->block(layer, head, page) : nullptr;
}

void Pool::reserve(int page) {
  require(page >= 0 && page < pages_, "page ", page, " of ", pages_);
  Mapping& slab = slabs_[page / slab_pages_];
  if (!slab) slab = Mapping(slab_pages_ * page_bytes());
  if (copies_) copies_->forget(page);
}

void Pool::write(int layer, int head, int slot, const float* k, const float* v) {
  with_lanes(type_, [&](auto lane_of) {
    lane_of(block(layer, head, slot / page_size), slot % page_size, head_dim_).write(k, v);
  });
}

void Pool::move(const int32_t* source, const int32_t* target, int count) {
  for (int i = 0; i < count; ++i) {
    for (const int slot : {source[i], target[i]}) {
      require(usable_slot(slot), "slot ", slot, " lies in no page that is in use");
    }
  }
  const int staged = (count + page_size - 1) / page_size;
  Buffer<char> stage(staged * block_bytes());
  with_lanes(type_, [&](auto lane_of) {
    const auto staging = [&](int i) {
      return lane_of(stage.data() + i / page_size * block_bytes(), i % page_size, head_dim_);
    };
    for (int layer = 0; layer < layers_; ++layer) {
      for (int head = 0; head < kv_heads_; ++head) {
        const auto lane = [&](int slot) {
          return lane_of(block(layer, head, slot / page_size), slot % page_size, head_dim_);
        };
        for (int i = 0; i < count; ++i) staging(i).copy_from(lane(source[i]));
        for (int i = 0; i < count; ++i) lane(target[i]).copy_from(staging(i));
      }
    }
  });
}

void Pool::gather(int layer, int head, const int32_t* slots, char* out) const {
  // Most tokens of a partial page lie in their lanes already. So copy the page, then put the other lanes right.
  const int page = slots[0] >= 0 ? slots[0] / page_size : 0;
  int in_place = 0;
  for (int i = 0; i < page_size; ++i) in_place += slots[i] == page * page_size + i;
  const bool whole = in_place >= page_size / 4;
  if (whole) std::memcpy(out, block(layer, head, page), block_bytes());
  else std::memset(out + values_at(), 0, block_bytes() - values_at());
  with_lanes(type_, [&](auto lane_of) {
    for (int i = 0; i < page_size; ++i) {
      const auto lane = lane_of(out, i, head_dim_);
      if (slots[i] < 0) {
        if (whole) lane.clear_value();
      } else if (!whole || slots[i] != page * page_size + i) {
        lane.copy_from(lane_of(block(layer, head, slots[i] / page_size), slots[i] % page_size, head_dim_));
      }
    }
  });
}

void Pool::key_bounds(int layer, int head, int page, int count, float* low, float* high) const {
  with_lanes(type_,
             [&](auto lane_of) { lane_of(block(layer, head, page), 0, head_dim_).key_bounds(count, low, high); });
}

void Pool::keys(int layer, int head, int page, int count, float* out) const {
  with_lanes(type_, [&](auto lane_of) {
    for (int i = 0; i < page_size; ++i)
      lane_of(block(layer, head, page), i, head_dim_).widen_key(count, out + i * count);
  });
}

void Pool::values(int layer, int head, int page, int count, float* out) const {
  with_lanes(type_, [&](auto lane_of) {
    for (int i = 0; i < page_size; ++i)
      lane_of(block(layer, head, page), i, head_dim_).widen_value(count, out + i * count);
  });
}

}  // namespace tokenswift
