// A memory of evicted pages: a state of fixed size for each layer and KV head, which later rows read.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/memory.h"
#include "engine/plan.h"
#include "engine/pool.h"
#include "engine/team.h"
#include "isa/kernels.h"

namespace tokenswift {

// The kinds of kvcache/memories. Linear and performer estimate a part of the softmax. The others mix their own values
// in.
enum class Remembering { linear, performer, infini, infini_linear };

// The sizes and constants of a memory. Heads are padded with zeros like the pool's.
struct RecallShape {
  Remembering kind = Remembering::performer;
  int layers = 0, heads = 0, kv_heads = 0, head_dim = 0;
  int features = 0;            // of a KV head; a multiple of vector_multiple
  std::vector<int32_t> keeps;  // [layers] 1 where a layer has a memory
  std::vector<float> table;    // performer: [padded head_dim][features] rows of random numbers, transposed
  std::vector<float> shares;   // infini: [layers][heads] of what is recalled in a head's output

  int padded() const { return round_up(head_dim, vector_multiple); }
  bool gated() const { return kind == Remembering::infini || kind == Remembering::infini_linear; }
};

// Feature f of a KV head has the sums 2^scale_f values_f and 2^scale_f keys_f: over evicted keys, phi_f(k) v and
// phi_f(k). A row's result depends on its own query and the memory alone, and pages are folded in their order by one
// thread for each (layer, KV head): so neither rows beside it nor threads change a bit.
class Recall {
 public:
  // Throws std::invalid_argument for sizes that do not fit.
  Recall(const Kernels& kernels, RecallShape shape);
  Recall(const Recall& other);

  const RecallShape& shape() const { return shape_; }
  size_t bytes() const { return (values_.size() + keys_.size() + scale_.size() + centre_.size()) * sizeof(float); }
  void clear();

  // Takes in pages. numbers: [count] which pages of the sequence they are. pages: [count] where they lie in the pool.
  // ropes: tables that each layer's keys were rotated by, without cos where they were not. shifts: linear's logarithms
  // (base 2) of the pages' scales, [layers][kv_heads][count].
  void fold(Team& team, const Pool& pool, const int32_t* numbers, const int32_t* pages, int count,
            const std::vector<RopeTables>& ropes, const float* shifts);

  bool keeps(int layer) const { return folded_ > 0 && shape_.keeps[layer]; }

  // Merges what is recalled for a query into the softmax state over the pages kept. query: [padded head_dim], rotated.
  void merge(int layer, int head, const float* query, float* state) const;

  // Mixes what is recalled for a query into values [padded head_dim]. head: of the queries. query: before RoPE.
  void mix(int layer, int head, const float* query, float* values) const;

 private:
  size_t at(int layer, int head) const { return size_t(layer) * shape_.kv_heads + head; }
  void fold_page(int layer, int head, float* keys, float* values, int start, const RopeTables& rope, float shift);
  void add_estimated(size_t place, const float* keys, const float* values);
  void add_scaled(size_t place, const float* keys, const float* values, float shift);
  void add_bound(size_t place, float* keys, float* values, int start, const RopeTables& rope);
  void rescale(size_t place, const float* scale);
  void features_of(const float* x, float* out) const;
  void sigma(const float* x, float* out) const;
  void recalled(size_t place, const float* weights, float top, float* state) const;

  const Kernels& kernels_;
  RecallShape shape_;
  std::vector<float> values_, keys_, scale_, centre_;
  int folded_ = 0;
};

}  // namespace tokenswift
