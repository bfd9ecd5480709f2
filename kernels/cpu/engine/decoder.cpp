#include "engine/decoder.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "engine/require.h"

namespace tokenswift {
namespace {

size_t padded(int n) { return round_up(n, row_multiple); }

constexpr int largest_size = 1 << 24;  // rows or columns of a matrix; no count of bytes or panels overflows up to it
constexpr int most_experts = 1 << 16;
constexpr double least_cap = 1e-3, largest_cap = 1e6;  // so that products with its inverse stay finite

// Each row's logits are wanted once at the most: the buffers have room for that.
void check_logit_rows(const Pass& pass) {
  require(pass.logit_count <= pass.rows, "logits of ", pass.logit_count, " rows of ", pass.rows);
  for (int i = 0; i < pass.logit_count; ++i) {
    const int row = pass.logit_rows[i];
    require(row >= 0 && row < pass.rows, "logit row ", row, " of ", pass.rows);
  }
}

const Shape& checked(const Shape& shape) {
  for (const int n : {shape.vocab, shape.hidden, shape.ffn, shape.layers, shape.heads, shape.kv_heads}) {
    require(n > 0 && n <= largest_size, "a model's sizes are between 1 and ", largest_size, ", not ", n);
  }
  require(shape.heads % shape.kv_heads == 0, "heads must be a multiple of kv_heads");
  require(shape.head_dim > 0 && shape.head_dim % 2 == 0 && shape.head_dim <= longest_head, "head_dim ", shape.head_dim,
          ": only even numbers up to 512 are allowed");
  require(shape.heads <= largest_size / shape.head_dim, "heads of ", shape.head_dim, " values: ", shape.heads);
  for (const std::vector<int>* each : {&shape.windows, &shape.ropes, &shape.mixtures}) {
    require(int(each->size()) == shape.layers, "as many windows, ropes and mixtures as layers");
  }
  for (const int window : shape.windows) require(window >= 0, "a window must not be negative");
  for (const int rope : shape.ropes) require(rope >= -1 && rope <= 1, "ropes are -1, 0 or 1");
  require(shape.score_scale > 0 && std::isfinite(shape.score_scale), "scale of scores: ", shape.score_scale);
  for (const double cap : {shape.attention_cap, shape.logit_cap}) {
    require(cap == 0 || (cap >= least_cap && cap <= largest_cap), "a soft cap is 0 or from ", least_cap, " to ",
            largest_cap, ", not ", cap);
  }
  require(shape.experts >= 0 && shape.experts <= most_experts, "experts: ", shape.experts);
  for (const int n : {shape.expert_ffn, shape.shared_ffn}) {
    require(n >= 0 && n <= largest_size, "columns of an expert: ", n);
  }
  if (shape.experts > 0 || std::count(shape.mixtures.begin(), shape.mixtures.end(), 0) < shape.layers) {
    require(shape.chosen > 0 && shape.chosen <= shape.experts, "a row takes ", shape.chosen, " of ", shape.experts,
            " experts");
    require(shape.expert_ffn > 0, "experts without columns");
  }
  return shape;
}

}  // namespace

Decoder::Decoder(const Shape& shape, Element weights, const Kernels& kernels, std::shared_ptr<Team> team)
    : shape_(checked(shape)),
      weights_(weights),
      kernels_(kernels),
      arithmetic_(kernels.of(weights)),
      attention_(kernels, shape.heads, shape.head_dim, shape.score_scale, shape.attention_cap),
      team_(std::move(team)) {
  hidden_stride_ = padded(shape.hidden);
  qkv_stride_ = padded(q_width() + 2 * kv_width());
  ffn_stride_ = padded(std::max({shape.ffn, shape.expert_ffn, shape.shared_ffn}));
  operand_stride_ = std::max({hidden_stride_, padded(q_width()), ffn_stride_});
  // An odd number of lines, so that rows do not meet in the same few sets of a cache.
  if (operand_stride_ / row_multiple % 2 == 0) operand_stride_ += row_multiple;
  score_stride_ = padded(shape.experts);
  head_ = linear(shape.vocab, shape.hidden);
  if (!shape.tied) embed_ = linear(shape.vocab, shape.hidden);
  final_norm_.assign(hidden_stride_, 0.0f);
  layers_.resize(shape.layers);
  for (int i = 0; i < shape.layers; ++i) {
    Layer& layer = layers_[i];
    layer.q = linear(q_width(), shape.hidden);
    layer.k = linear(kv_width(), shape.hidden);
    layer.v = linear(kv_width(), shape.hidden);
    layer.o = linear(shape.hidden, q_width());
    if (shape.mixtures[i]) {
      layer.experts.resize(shape.experts);
      for (FeedForward& expert : layer.experts) expert = feed_forward_of(shape.expert_ffn);
      layer.router.weight = Matrix(Element::f32, kernels.panel, shape.experts, shape.hidden);
      if (shape.shared_ffn) {
        layer.shared = feed_forward_of(shape.shared_ffn);
        layer.shared_gate.weight = Matrix(Element::f32, kernels.panel, 1, shape.hidden);
      }
    } else {
      layer.dense = feed_forward_of(shape.ffn);
    }
    layer.input_norm.assign(hidden_stride_, 0.0f);
    layer.post_norm.assign(hidden_stride_, 0.0f);
    if (shape.post_norms) {
      layer.attention_norm.assign(hidden_stride_, 0.0f);
      layer.ffn_norm.assign(hidden_stride_, 0.0f);
    }
    if (shape.qk_norm) {
      layer.q_norm.assign(padded_head(), 0.0f);
      layer.k_norm.assign(padded_head(), 0.0f);
    }
    layer.window = shape.windows[i];
    layer.rope = shape.ropes[i];
  }
}

Decoder::FeedForward Decoder::feed_forward_of(int ffn) const {
  return {linear(ffn, shape_.hidden), linear(ffn, shape_.hidden), linear(shape_.hidden, ffn)};
}

// Counts the bytes of the layers' matrices and the head. idle: whether experts that a row does not take count, too.
size_t Decoder::matrix_bytes(bool idle) const {
  const auto of = [](const FeedForward& part) {
    return part.gate.weight.bytes() + part.up.weight.bytes() + part.down.weight.bytes();
  };
  size_t bytes = head_.weight.bytes();
  for (const Layer& layer : layers_) {
    for (const Linear* linear : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.router, &layer.shared_gate}) {
      bytes += linear->weight.bytes();
    }
    bytes += of(layer.dense) + of(layer.shared);
    size_t experts = 0;
    for (const FeedForward& expert : layer.experts) experts += of(expert);
    bytes += idle || !shape_.experts ? experts : experts * shape_.chosen / shape_.experts;
  }
  return bytes;
}

Decoder::Layer& Decoder::layer_at(int layer) {
  require(layer >= 0 && layer < shape_.layers, "layer ", layer, " of ", shape_.layers);
  return layers_[layer];
}

Decoder::Linear& Decoder::linear_at(const std::string& part, int index) {
  if (part == "head" || (part == "embed" && shape_.tied)) return head_;
  if (part == "embed") return embed_;
  Layer& layer = layer_at(index);
  if (part == "q") return layer.q;
  if (part == "k") return layer.k;
  if (part == "v") return layer.v;
  if (part == "o") return layer.o;
  return expert_linear(part, layer);
}

// Finds a matrix of a layer's feed-forward, such as gate, shared.gate, experts.N.gate or router.
Decoder::Linear& Decoder::expert_linear(const std::string& part, Layer& layer) {
  const size_t dot = part.rfind('.');
  const std::string owner = dot == std::string::npos ? "" : part.substr(0, dot);
  const std::string name = dot == std::string::npos ? part : part.substr(dot + 1);
  FeedForward* of = owner.empty() ? &layer.dense : owner == "shared" ? &layer.shared : nullptr;
  for (size_t i = 0; i < layer.experts.size() && !of; ++i) {
    if (owner == "experts." + std::to_string(i)) of = &layer.experts[i];
  }
  Linear* found = nullptr;
  if (owner.empty() && name == "router") found = &layer.router;
  if (owner.empty() && name == "shared_gate") found = &layer.shared_gate;
  if (of && name == "gate") found = &of->gate;
  if (of && name == "up") found = &of->up;
  if (of && name == "down") found = &of->down;
  require(found && found->weight, "unknown part '", part, "'");
  return *found;
}

Element Decoder::set_matrix(const std::string& part, int layer, const MatrixSource& source, bool fewest) {
  const std::lock_guard<std::mutex> turn(team_->turn());
  Matrix& matrix = linear_at(part, layer).weight;
  Element element = matrix.element();
  const bool blocks = in_blocks(element);
  if (blocks && in_blocks(source.element)) element = source.element;
  else if (blocks && fewest && four_bits_suffice(*team_, source)) element = Element::q4;
  Matrix packed(element, kernels_.panel, matrix.rows(), matrix.columns());
  try {
    packed.pack(*team_, source);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(part + ": " + error.what());
  }
  matrix = std::move(packed);
  return matrix.element();
}

void Decoder::set_vector(const std::string& part, int layer, const float* data, int rows) {
  const std::lock_guard<std::mutex> turn(team_->turn());
  const auto copy = [&](std::vector<float>& whole, int expected) {
    require(rows == expected, part, " has ", expected, " values, not ", rows);
    std::copy_n(data, rows, whole.begin());
  };
  if (part == "final_norm") return copy(final_norm_, shape_.hidden);
  if (part == "input_norm") return copy(layer_at(layer).input_norm, shape_.hidden);
  if (part == "post_norm") return copy(layer_at(layer).post_norm, shape_.hidden);
  if (part == "attention_norm" && shape_.post_norms) return copy(layer_at(layer).attention_norm, shape_.hidden);
  if (part == "ffn_norm" && shape_.post_norms) return copy(layer_at(layer).ffn_norm, shape_.hidden);
  if (part == "q_norm" && shape_.qk_norm) return copy(layer_at(layer).q_norm, shape_.head_dim);
  if (part == "k_norm" && shape_.qk_norm) return copy(layer_at(layer).k_norm, shape_.head_dim);
  const size_t stem = part.rfind("_bias");
  const std::string matrix = part.substr(0, stem);
  const bool biased = matrix != "embed" && matrix != "head" && matrix != "router" && matrix != "shared_gate";
  require(stem != std::string::npos && stem + 5 == part.size() && biased, "unknown vector '", part, "'");
  Linear& linear = linear_at(matrix, layer);
  linear.bias.assign(size_t(linear.weight.panels()) * kernels_.panel, 0.0f);
  copy(linear.bias, linear.weight.rows());
}

void Decoder::check(const Pass& pass, const Pool& pool) const {
  require(pool.layers() == shape_.layers && pool.kv_heads() == shape_.kv_heads && pool.head_dim() == padded_head(),
          "the pool's pages are not of this model's shape");
  require(pass.rows > 0, "a pass without rows");
  require(!shape_.experts || pass.rows <= INT_MAX / shape_.chosen, "too many rows: ", pass.rows);
  check_shifts(pass.rope.shifts, pass.context);
  require(pass.local.cos || std::count(shape_.ropes.begin(), shape_.ropes.end(), 1) == 0,
          "this model needs local RoPE tables");
  for (int row = 0; row < pass.rows; ++row) {
    require(pass.tokens[row] >= 0 && pass.tokens[row] < shape_.vocab, "token ", pass.tokens[row], " of ", shape_.vocab);
    require(pass.positions[row] >= 0 && pass.positions[row] < pass.context, "position ", pass.positions[row], " of ",
            pass.context);
    require(pool.usable_slot(pass.slots[row]), "slot ", pass.slots[row], " is not in use");
  }
  check_logit_rows(pass);
  require(!pass.chosen || pass.chosen->are_of(head_.weight), "the chosen rows are of another head");
  int row = 0;
  for (const SegmentInput& segment : pass.segments) {
    require(segment.start == row && segment.rows > 0 && segment.rows <= pass.rows - row,
            "segments must cover the rows in order");
    require(std::equal(segment.positions, segment.positions + segment.rows, pass.positions + row),
            "a segment's positions are not the pass's");
    if (segment.recall) check(*segment.recall);
    if (pass.mass) {
      const int last = *std::max_element(segment.positions, segment.positions + segment.rows);
      require(pass.mass_pages % vector_multiple == 0 && last / page_size < pass.mass_pages, "too few pages of mass");
    }
    row += segment.rows;
  }
  require(row == pass.rows, "segments must cover the rows in order");
}

void Decoder::check(const Recall& recall) const {
  const RecallShape& of = recall.shape();
  require(of.layers == shape_.layers && of.heads == shape_.heads && of.kv_heads == shape_.kv_heads &&
              of.head_dim == shape_.head_dim,
          "the memory is not of this model's shape");
}

void Decoder::reserve(const Pass& pass, const Pool& pool) {
  const size_t rows = pass.rows;
  buffers_.x.reserve(rows * hidden_stride_);
  buffers_.normed.reserve(rows * hidden_stride_);
  buffers_.qkv.reserve(rows * qkv_stride_);
  buffers_.attended.reserve(rows * padded(q_width()));
  buffers_.activated.reserve(rows * ffn_stride_);
  if (shape_.post_norms || shape_.experts) buffers_.added.reserve(rows * hidden_stride_);
  buffers_.operands.reserve((rows + spare_rows) * operand_stride_ * arithmetic_.operand_bytes);
  buffers_.queries.reserve((rows * shape_.heads + spare_rows) * kernels_.of(pool.type()).query_bytes(padded_head()));
  if (pass.int8_pages) buffers_.copy_queries.reserve((rows * shape_.heads + spare_rows) * copy_query_bytes());
  if (pass.rope.shifts.shifts) buffers_.plain_queries.reserve(rows * shape_.heads * padded_head());
  recalls_.clear();
  for (const SegmentInput& segment : pass.segments) recalls_.insert(recalls_.end(), segment.rows, segment.recall);
  const bool recalls = std::any_of(recalls_.begin(), recalls_.end(), [](const Recall* each) { return each; });
  if (recalls) buffers_.asking.reserve(rows * shape_.heads * padded_head());
}

void Decoder::forward(const Pass& pass, Pool& pool) {
  const std::lock_guard<std::mutex> turn(team_->turn());
  const FlushDenormals flush;
  const RestAtEnd rest{kernels_};
  check(pass, pool);
  std::vector<SegmentPlan> plans;
  for (const SegmentInput& segment : pass.segments) plans.push_back(plan_segment(segment, pool, pass.context));
  reserve(pass, pool);
  PageCopies* const copies = pass.int8_pages ? pool.copies() : nullptr;
  if (copies) copies->update(*team_, kernels_, plans);
  const int mass_pages = pass.mass ? pass.mass_pages : 0;
  attention_.prepare(std::move(plans), pool, copies, pass.rope, pass.rows, mass_pages, team_->size());
  pass.stream ? load(pass) : embed(pass);
  for (int i = 0; i < shape_.layers; ++i) {
    const Layer& layer = layers_[i];
    tap(pass, i);
    normalise(layer.input_norm.data(), pass.rows);
    project_qkv(layer, pass.rows);
    rotate_and_store(layer, i, pass, pool);
    attend(layer, i, pass);
    if (shape_.post_norms) {
      project_into_added(layer.o, pass.rows);
      add_normalised(layer.attention_norm, pass.rows);
    } else {
      add_projected(layer.o, pass.rows);
    }
    normalise(layer.post_norm.data(), pass.rows);
    if (!layer.experts.empty()) {
      mix_experts(layer, pass.rows);
    } else {
      feed_forward(layer.dense, pass.rows);
      if (!shape_.post_norms) {
        add_projected(layer.dense.down, pass.rows);
        continue;
      }
      project_into_added(layer.dense.down, pass.rows);
    }
    add_normalised(layer.ffn_norm, pass.rows);
  }
  finish(pass);
}

// Computes the products [rows][panel] of operand rows x with one panel, and adds the bias.
void Decoder::multiply(const Linear& linear, int panel, const char* x, int rows, float* products) const {
  const int width = kernels_.panel;
  const Matrix& weight = linear.weight;
  kernels_.of(weight.element())
      .multiply(weight.panel_data(panel), weight.steps(), x, operand_stride_, rows, products, width);
  if (linear.bias.empty()) return;
  const float* bias = linear.bias.data() + panel * width;
  for (int row = 0; row < rows; ++row)
    for (int i = 0; i < width; ++i) products[row * width + i] += bias[i];
}

char* Decoder::operands(int row) const {
  return buffers_.operands.data() + row * operand_stride_ * arithmetic_.operand_bytes;
}

void Decoder::embed(const Pass& pass) {
  const Matrix& table = (shape_.tied ? head_ : embed_).weight;
  team_->run(pass.rows, size_t(pass.rows) * shape_.hidden * 16, [&](int row, int) {
    float* x = buffers_.x.data() + row * hidden_stride_;
    table.unpack_row(pass.tokens[row], x);
    std::fill(x + shape_.hidden, x + hidden_stride_, 0.0f);
    if (shape_.embedding_scale != 1.0f) {
      for (int i = 0; i < shape_.hidden; ++i) x[i] *= shape_.embedding_scale;
    }
  });
}

// Takes the residual stream that another decoder's layers have left.
void Decoder::load(const Pass& pass) {
  for (int row = 0; row < pass.rows; ++row) {
    float* x = buffers_.x.data() + row * hidden_stride_;
    std::copy_n(pass.stream + size_t(row) * shape_.hidden, shape_.hidden, x);
    std::fill(x + shape_.hidden, x + hidden_stride_, 0.0f);
  }
}

// Copies the residual stream that enters a layer to the pass's taps, if that layer is one of them.
void Decoder::tap(const Pass& pass, int layer) const {
  const int32_t* const end = pass.tapped + pass.tap_count;
  const int32_t* const found = std::find(pass.tapped, end, layer);
  if (found == end) return;
  for (int row = 0; row < pass.rows; ++row) {
    const size_t place = size_t(row) * pass.tap_count + (found - pass.tapped);
    std::copy_n(buffers_.x.data() + row * hidden_stride_, shape_.hidden, pass.taps + place * shape_.hidden);
  }
}

// Normalises the residual stream, and rounds it to operands of the next multiplication.
void Decoder::normalise(const float* weight, int rows) {
  team_->run(rows, rows * hidden_stride_, [&](int row, int) {
    float* normed = buffers_.normed.data() + row * hidden_stride_;
    kernels_.rms_norm(buffers_.x.data() + row * hidden_stride_, weight, shape_.hidden, shape_.norm_eps, normed);
    round(normed, shape_.hidden, row);
  });
}

// Adds the rows of `added` to the residual stream, normed first where the layer has a norm for them.
void Decoder::add_normalised(const std::vector<float>& weight, int rows) {
  team_->run(rows, rows * hidden_stride_, [&](int row, int) {
    float* x = buffers_.x.data() + row * hidden_stride_;
    float* added = buffers_.added.data() + row * hidden_stride_;
    if (!weight.empty()) kernels_.rms_norm(added, weight.data(), shape_.hidden, shape_.norm_eps, added);
    for (int i = 0; i < shape_.hidden; ++i) x[i] += added[i];
  });
}

void Decoder::round_rows(const float* x, size_t stride, int columns, int rows) {
  team_->run(rows, size_t(rows) * columns, [&](int row, int) { round(x + row * stride, columns, row); });
}

void Decoder::project_qkv(const Layer& layer, int rows) {
  const int width = kernels_.panel;
  const Linear* const parts[] = {&layer.q, &layer.k, &layer.v};
  int panels = 0;
  for (const Linear* part : parts) panels += part->weight.panels();
  share(rows, panels, [&](int panel, int first, int count, float* products) {
    int part = 0, column = 0;
    for (; panel >= parts[part]->weight.panels(); ++part) {
      panel -= parts[part]->weight.panels();
      column += parts[part]->weight.rows();
    }
    multiply(*parts[part], panel, first, count, products);
    const int columns = std::min(width, parts[part]->weight.rows() - panel * width);
    for (int row = 0; row < count; ++row) {
      std::memcpy(buffers_.qkv.data() + (first + row) * qkv_stride_ + column + panel * width, products + row * width,
                  columns * sizeof(float));
    }
  });
}

void Decoder::rotate_and_store(const Layer& layer, int index, const Pass& pass, Pool& pool) {
  team_->run(pass.rows, pass.rows * qkv_stride_ * 4, [&](int row, int) { rotate_row(layer, index, pass, pool, row); });
}

void Decoder::rotate_row(const Layer& layer, int index, const Pass& pass, Pool& pool, int row) {
  const int head_dim = shape_.head_dim, group = shape_.heads / shape_.kv_heads;
  const PageKernels& cached = kernels_.of(pool.type());
  const float* q = buffers_.qkv.data() + row * qkv_stride_;
  const float* k = q + q_width();
  const float* v = k + kv_width();
  const bool moved = moves(layer, pass);
  alignas(64) float head_q[longest_head] = {}, head_k[longest_head] = {},
                    head_v[longest_head] = {};  // zeros after the values
  // Attention scales scores. Whoever else multiplies queries with keys gets queries that have this factor.
  const float scale = float(shape_.score_scale);
  const auto tell = [&](float* out, int count) {
    for (int i = 0; i < count; ++i) out[i] = head_q[i] * scale;
  };
  for (int head = 0; head < shape_.heads; ++head) {
    std::copy_n(q + head * head_dim, head_dim, head_q);
    normalise_head(head_q, layer.q_norm);
    const size_t query = (size_t(head / group) * pass.rows + row) * group + head % group;
    if (moved) std::copy_n(head_q, padded_head(), buffers_.plain_queries.data() + query * padded_head());
    float* asking = recalls_[row] ? buffers_.asking.data() + query * padded_head() : nullptr;
    if (asking && recalls_[row]->shape().gated()) tell(asking, padded_head());
    rotate_head(head_q, pass, row, layer.rope);
    if (asking && !recalls_[row]->shape().gated()) tell(asking, padded_head());
    if (pass.queries) {
      const size_t at = (size_t(row) * shape_.layers + index) * shape_.heads + head;
      tell(pass.queries + at * head_dim, head_dim);
    }
    cached.round(head_q, padded_head(), buffers_.queries.data() + query * cached.query_bytes(padded_head()));
    if (pass.int8_pages) {
      kernels_.int8_pages.round(head_q, padded_head(), buffers_.copy_queries.data() + query * copy_query_bytes());
    }
  }
  for (int head = 0; head < shape_.kv_heads; ++head) {
    std::copy_n(k + head * head_dim, head_dim, head_k);
    std::copy_n(v + head * head_dim, head_dim, head_v);
    normalise_head(head_k, layer.k_norm);
    rotate_head(head_k, pass, row, layer.rope);
    pool.write(index, head, pass.slots[row], head_k, head_v);
  }
}

void Decoder::normalise_head(float* x, const std::vector<float>& norm) const {
  if (shape_.qk_norm) kernels_.rms_norm(x, norm.data(), shape_.head_dim, shape_.norm_eps, x);
}

void Decoder::rotate_head(float* x, const Pass& pass, int row, int rope) const {
  if (rope < 0) return;
  const RopeTables& tables = rope == 0 ? pass.rope : pass.local;
  const int half = shape_.head_dim / 2;
  const size_t angles = size_t(pass.positions[row]) * half;
  kernels_.rotate(x, tables.cos + angles, tables.sin + angles, half, x);
}

void Decoder::attend(const Layer& layer, int index, const Pass& pass) {
  const size_t stride = padded(q_width());
  float* mass = pass.mass;
  if (mass) mass += size_t(index) * pass.rows * shape_.kv_heads * pass.mass_pages;
  const float* plain = moves(layer, pass) ? buffers_.plain_queries.data() : nullptr;
  attention_.run(*team_, {index, layer.window, buffers_.queries.data(), buffers_.copy_queries.data(), plain,
                          buffers_.asking.data(), buffers_.attended.data(), stride, mass});
  round_rows(buffers_.attended.data(), stride, q_width(), pass.rows);
}

// Adds the operands times `linear` to the residual stream.
void Decoder::add_projected(const Linear& linear, int rows) {
  const int width = kernels_.panel;
  share(rows, linear.weight.panels(), [&](int panel, int first, int count, float* products) {
    multiply(linear, panel, first, count, products);
    for (int row = 0; row < count; ++row) {
      float* x = buffers_.x.data() + (first + row) * hidden_stride_ + panel * width;
      for (int i = 0; i < width; ++i) x[i] += products[row * width + i];
    }
  });
}

// Writes the operands times `linear` into `added`.
void Decoder::project_into_added(const Linear& linear, int rows) {
  const int width = kernels_.panel;
  share(rows, linear.weight.panels(), [&](int panel, int first, int count, float* products) {
    multiply(linear, panel, first, count, products);
    for (int row = 0; row < count; ++row) {
      std::memcpy(buffers_.added.data() + (first + row) * hidden_stride_ + panel * width, products + row * width,
                  width * sizeof(float));
    }
  });
}

// Computes one panel of a gated feed-forward. x: operand rows. products: room for the products of two panels. out:
// activations of the first row.
void Decoder::gate_panel(const FeedForward& part, int panel, const char* x, int rows, float* products,
                         float* out) const {
  const int width = kernels_.panel;
  float* up = products + size_t(rows) * width;
  multiply(part.gate, panel, x, rows, products);
  multiply(part.up, panel, x, rows, up);
  (shape_.gelu ? kernels_.geglu : kernels_.swiglu)(products, up, rows * width, products);
  for (int row = 0; row < rows; ++row) {
    std::memcpy(out + row * ffn_stride_ + panel * width, products + row * width, width * sizeof(float));
  }
}

// Computes a gated feed-forward up to the operands of its down projection.
void Decoder::feed_forward(const FeedForward& part, int rows) {
  share(rows, part.gate.weight.panels(), [&](int panel, int first, int count, float* products) {
    gate_panel(part, panel, operands(first), count, products, buffers_.activated.data() + first * ffn_stride_);
  });
  round_rows(buffers_.activated.data(), ffn_stride_, part.gate.weight.rows(), rows);
}

void Decoder::finish(const Pass& pass) {
  normalise(final_norm_.data(), pass.rows);
  for (int row = 0; row < pass.rows; ++row) {
    std::memcpy(pass.hidden + size_t(row) * shape_.hidden, buffers_.normed.data() + row * hidden_stride_,
                shape_.hidden * sizeof(float));
    std::memcpy(pass.residual + size_t(row) * shape_.hidden, buffers_.x.data() + row * hidden_stride_,
                shape_.hidden * sizeof(float));
  }
  for (int i = 0; i < pass.logit_count; ++i) {
    round(buffers_.normed.data() + pass.logit_rows[i] * hidden_stride_, shape_.hidden, i);
  }
  if (pass.chosen) project_chosen(*pass.chosen, pass.logit_count, pass.logits);
  else project_rounded(pass.logit_count, pass.logits);
}

void Decoder::close(const Pass& pass) {
  check_logit_rows(pass);
  const std::lock_guard<std::mutex> turn(team_->turn());
  const FlushDenormals flush;
  const RestAtEnd rest{kernels_};
  const size_t rows = pass.rows;
  buffers_.x.reserve(rows * hidden_stride_);
  buffers_.normed.reserve(rows * hidden_stride_);
  buffers_.operands.reserve((rows + spare_rows) * operand_stride_ * arithmetic_.operand_bytes);
  load(pass);
  finish(pass);
}

void Decoder::project(const float* hidden, int rows, float* logits) {
  const std::lock_guard<std::mutex> turn(team_->turn());
  const FlushDenormals flush;
  const RestAtEnd rest{kernels_};
  buffers_.operands.reserve(size_t(rows + spare_rows) * operand_stride_ * arithmetic_.operand_bytes);
  std::vector<float> row(hidden_stride_, 0.0f);  // zeros after the values
  for (int i = 0; i < rows; ++i) {
    std::copy_n(hidden + size_t(i) * shape_.hidden, shape_.hidden, row.begin());
    round(row.data(), shape_.hidden, i);
  }
  project_rounded(rows, logits);
}

// Computes the operands times the head.
void Decoder::project_rounded(int rows, float* logits) {
  const int width = kernels_.panel;
  share(rows, head_.weight.panels(), [&](int panel, int first, int count, float* products) {
    multiply(head_, panel, first, count, products);
    if (shape_.logit_cap > 0) kernels_.soft_cap(products, count * width, float(shape_.logit_cap));
    const int columns = std::min(width, shape_.vocab - panel * width);
    for (int row = 0; row < count; ++row) {
      std::memcpy(logits + size_t(first + row) * shape_.vocab + panel * width, products + row * width,
                  columns * sizeof(float));
    }
  });
}

}  // namespace tokenswift
