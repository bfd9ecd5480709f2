#include "engine/recall.h"

#include <algorithm>
#include <cmath>

#include "engine/require.h"

namespace tokenswift {
namespace {

constexpr float log2e = 1.4426950408889634f;
constexpr int most_features = 1024;

}  // namespace

Recall::Recall(const Kernels& kernels, RecallShape shape) : kernels_(kernels), shape_(std::move(shape)) {
  const RecallShape& s = shape_;
  require(s.layers > 0 && s.kv_heads > 0 && s.heads % s.kv_heads == 0 && s.head_dim > 0 && s.head_dim <= longest_head,
          "a memory's sizes are those of a model");
  require(s.features > 0 && s.features <= most_features && s.features % vector_multiple == 0,
          "features are a multiple of 16 up to 1024, not ", s.features);
  require(int(s.keeps.size()) == s.layers, "a memory is kept, or not, for each layer");
  require(s.kind == Remembering::performer ? s.table.size() == size_t(s.padded()) * s.features
                                           : s.features == s.padded() && s.table.empty(),
          "a table of random rows is [padded head_dim, features], and only performer has one");
  require(s.shares.size() == (s.gated() ? size_t(s.layers) * s.heads : 0), "shares are [layers, heads] of infini");
  const size_t heads = size_t(s.layers) * s.kv_heads;
  values_.resize(heads * s.features * s.padded());
  keys_.resize(heads * s.features);
  scale_.resize(heads * s.features);
  centre_.resize(heads * s.padded());
  clear();
}

Recall::Recall(const Recall& other) = default;

void Recall::clear() {
  folded_ = 0;
  for (std::vector<float>* state : {&values_, &keys_, &centre_}) std::fill(state->begin(), state->end(), 0.0f);
  std::fill(scale_.begin(), scale_.end(), shape_.gated() ? 0.0f : no_maximum);
}

void Recall::fold(Team& team, const Pool& pool, const int32_t* numbers, const int32_t* pages, int count,
                  const std::vector<RopeTables>& ropes, const float* shifts) {
  const std::lock_guard<std::mutex> turn(team.turn());
  const FlushDenormals flush;
  const int padded = shape_.padded(), heads = shape_.kv_heads;
  team.run(shape_.layers * heads, [&](int piece, int) {
    const int layer = piece / heads, head = piece % heads;
    if (!shape_.keeps[layer]) return;
    Buffer<float> keys(size_t(page_size) * padded), values(size_t(page_size) * padded);
    for (int i = 0; i < count; ++i) {
      pool.keys(layer, head, pages[i], padded, keys.data());
      pool.values(layer, head, pages[i], padded, values.data());
      const float shift = shifts ? shifts[at(layer, head) * count + i] : 0.0f;
      fold_page(layer, head, keys.data(), values.data(), numbers[i] * page_size, ropes[layer], shift);
    }
  });
  folded_ += count;
}

void Recall::fold_page(int layer, int head, float* keys, float* values, int start, const RopeTables& rope,
                       float shift) {
  const size_t place = at(layer, head);
  if (shape_.gated()) return add_bound(place, keys, values, start, rope);
  if (shape_.kind == Remembering::linear) return add_scaled(place, keys, values, shift);
  add_estimated(place, keys, values);
}

// Writes the logarithms (base 2) of a key's or query's random features.
void Recall::features_of(const float* x, float* out) const {
  const float size = std::sqrt(float(shape_.head_dim));
  const float square = kernels_.dot(x, x, shape_.padded()) / size;
  const float offset = -0.5f * (square * log2e + std::log2(float(shape_.features)));
  kernels_.project(x, shape_.table.data(), shape_.padded(), shape_.features, offset, out);
}

// Writes elu(x) + 1 of a head's values, and zeros after them.
void Recall::sigma(const float* x, float* out) const {
  kernels_.sigma(x, shape_.padded(), out);
  std::fill(out + shape_.head_dim, out + shape_.padded(), 0.0f);
}

// Brings the sums of a head to new scales, which are no smaller.
void Recall::rescale(size_t place, const float* scale) {
  const int features = shape_.features, padded = shape_.padded();
  float* old = scale_.data() + place * features;
  float* keys = keys_.data() + place * features;
  alignas(64) float shrunk[most_features];
  kernels_.powers(old, scale, 0.0f, features, shrunk);
  for (int f = 0; f < features; ++f) {
    keys[f] *= shrunk[f];
    float* values = values_.data() + (place * features + f) * padded;
    for (int i = 0; i < padded; ++i) values[i] *= shrunk[f];
    old[f] = scale[f];
  }
}

void Recall::add_estimated(size_t place, const float* keys, const float* values) {
  const int features = shape_.features, padded = shape_.padded();
  float* centre = centre_.data() + place * padded;
  float* sums = keys_.data() + place * features;
  if (std::all_of(sums, sums + features, [](float sum) { return sum == 0.0f; })) {  // the first page
    const float part = 1.0f / page_size;
    for (int t = 0; t < page_size; ++t) kernels_.add_outer(&part, 1, keys + t * padded, padded, centre);
  }
  Buffer<float> logs(size_t(page_size) * features);
  alignas(64) float centred[longest_head], scale[most_features], weights[most_features];
  std::copy_n(scale_.data() + place * features, features, scale);
  for (int t = 0; t < page_size; ++t) {
    for (int i = 0; i < padded; ++i) centred[i] = keys[t * padded + i] - centre[i];
    float* own = logs.data() + size_t(t) * features;
    features_of(centred, own);
    for (int f = 0; f < features; ++f) scale[f] = std::max(scale[f], own[f]);
  }
  rescale(place, scale);
  for (int t = 0; t < page_size; ++t) {
    kernels_.powers(logs.data() + size_t(t) * features, scale, 0.0f, features, weights);
    for (int f = 0; f < features; ++f) sums[f] += weights[f];
    kernels_.add_outer(weights, features, values + t * padded, padded, values_.data() + place * features * padded);
  }
}

void Recall::add_scaled(size_t place, const float* keys, const float* values, float shift) {
  const int features = shape_.features, padded = shape_.padded();
  alignas(64) float scale[most_features], weights[most_features], factor[vector_multiple] = {};
  std::fill_n(scale, features, std::max(scale_[place * features], shift));
  rescale(place, scale);
  std::fill_n(factor, vector_multiple, shift - scale[0]);
  kernels_.powers(factor, nullptr, 0.0f, vector_multiple, factor);
  for (int t = 0; t < page_size; ++t) {
    sigma(keys + t * padded, weights);
    for (int f = 0; f < features; ++f) {
      weights[f] *= factor[0];
      keys_[place * features + f] += weights[f];
    }
    kernels_.add_outer(weights, features, values + t * padded, padded, values_.data() + place * features * padded);
  }
}

// Binds values to keys before RoPE. By the delta rule what is recalled for the keys already is taken off the values.
void Recall::add_bound(size_t place, float* keys, float* values, int start, const RopeTables& rope) {
  const int features = shape_.features, padded = shape_.padded(), half = shape_.head_dim / 2;
  const float* sums = keys_.data() + place * features;
  const bool holds = std::any_of(sums, sums + features, [](float sum) { return sum != 0.0f; });
  alignas(64) float cos[longest_head], sin[longest_head], state[state_floats(longest_head)], known[longest_head];
  for (int t = 0; t < page_size; ++t) {
    float* key = keys + t * padded;
    if (rope.cos) {
      const float* c = rope.cos + size_t(start + t) * half;
      const float* s = rope.sin + size_t(start + t) * half;
      for (int i = 0; i < half; ++i) {
        const float size = c[i] * c[i] + s[i] * s[i];  // divides the attention factor out, too
        cos[i] = c[i] / size;
        sin[i] = -s[i] / size;
      }
      kernels_.rotate(key, cos, sin, half, key);
    }
    sigma(key, key);
    if (shape_.kind == Remembering::infini && holds) {
      recalled(place, key, 0.0f, state);
      kernels_.normalise(state, padded, known);
      for (int i = 0; i < padded; ++i) values[t * padded + i] -= known[i];
    }
  }
  for (int t = 0; t < page_size; ++t) {
    for (int f = 0; f < features; ++f) keys_[place * features + f] += keys[t * padded + f];
    kernels_.add_outer(keys + t * padded, features, values + t * padded, padded,
                       values_.data() + place * features * padded);
  }
}

// Makes the softmax state of a query with these weights, which refer to 2^top.
void Recall::recalled(size_t place, const float* weights, float top, float* state) const {
  kernels_.recall(weights, keys_.data() + place * shape_.features,
                  values_.data() + place * shape_.features * shape_.padded(), shape_.features, shape_.padded(), state);
  state[state_maximum(shape_.padded())] = top;
}

void Recall::merge(int layer, int head, const float* query, float* state) const {
  const size_t place = at(layer, head);
  const int features = shape_.features, padded = shape_.padded();
  const float* scale = scale_.data() + place * features;
  alignas(64) float weights[most_features], part[state_floats(longest_head)] = {};
  float top = 0.0f;
  if (shape_.kind == Remembering::linear) {
    sigma(query, weights);
    top = scale[0];
  } else {
    features_of(query, weights);
    for (int f = 0; f < features; ++f) weights[f] += scale[f];
    const float largest = *std::max_element(weights, weights + features);
    kernels_.powers(weights, nullptr, largest, features, weights);
    const float shared = kernels_.dot(query, centre_.data() + place * padded, padded);
    top = largest + shared * (log2e / std::sqrt(float(shape_.head_dim)));
  }
  recalled(place, weights, top, part);
  kernels_.merge(state, part, padded);
}

void Recall::mix(int layer, int head, const float* query, float* values) const {
  const size_t place = at(layer, head / (shape_.heads / shape_.kv_heads));
  alignas(64) float weights[longest_head], state[state_floats(longest_head)] = {}, found[longest_head];
  sigma(query, weights);
  recalled(place, weights, 0.0f, state);
  kernels_.normalise(state, shape_.padded(), found);
  const float share = shape_.shares[size_t(layer) * shape_.heads + head];
  for (int i = 0; i < shape_.padded(); ++i) values[i] += share * (found[i] - values[i]);
}

}  // namespace tokenswift
