#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace tokenswift {
namespace {

constexpr int row_multiple = 32;  // whole panels of every ISA, whole vectors of every kernel
constexpr int row_block = 96;     // rows of one piece of a multiplication: whole tiles of every ISA
constexpr int widest_panel = 32;

void require(bool condition, const std::string& what) {
  if (!condition) throw std::invalid_argument(what);
}

std::string among(const char* name, long value, long limit) {
  return std::string(name) + " " + std::to_string(value) + " of " + std::to_string(limit);
}

size_t padded(int n) { return round_up(n, row_multiple); }

// In place, halves against each other as in Hugging Face's checkpoints.
void rotate(float* x, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cos[i] - second * sin[i];
    x[i + half] = second * cos[i] + first * sin[i];
  }
}

void add_bias(float* block, const std::vector<float>& bias, int column, int columns, int rows) {
  if (bias.empty()) return;
  for (int row = 0; row < rows; ++row)
    for (int i = 0; i < columns; ++i) block[row * columns + i] += bias[column + i];
}

}  // namespace

Decoder::Decoder(const Shape& shape, Element weights, const Kernels& kernels, int threads)
    : shape_(shape),
      weights_(weights),
      kernels_(kernels),
      arithmetic_(kernels.of(weights)),
      attention_(kernels, shape.heads, shape.head_dim),
      team_(threads) {
  for (const int n : {shape.vocab, shape.hidden, shape.ffn, shape.layers, shape.heads, shape.kv_heads}) {
    require(n > 0, "a model's sizes must be positive");
  }
  require(shape.heads % shape.kv_heads == 0, "heads must be a multiple of kv_heads");
  require(shape.head_dim > 0 && shape.head_dim % 2 == 0 && shape.head_dim <= longest_head,
          "head_dim " + std::to_string(shape.head_dim) + ": only even numbers up to 512 are allowed");
  require(int(shape.windows.size()) == shape.layers, "as many windows as layers");
  hidden_stride_ = padded(shape.hidden);
  qkv_stride_ = padded(q_width() + 2 * kv_width());
  ffn_stride_ = padded(shape.ffn);
  operand_stride_ = std::max({hidden_stride_, padded(q_width()), ffn_stride_});

  const auto matrix = [&](int rows, int columns) { return Matrix(weights, kernels.panel, rows, columns); };
  head_ = matrix(shape.vocab, shape.hidden);
  if (!shape.tied) embed_ = matrix(shape.vocab, shape.hidden);
  final_norm_.assign(hidden_stride_, 0.0f);
  layers_.resize(shape.layers);
  for (int i = 0; i < shape.layers; ++i) {
    Layer& layer = layers_[i];
    layer.qkv = matrix(q_width() + 2 * kv_width(), shape.hidden);
    layer.o = matrix(shape.hidden, q_width());
    layer.gate_up = matrix(2 * round_up(shape.ffn, kernels.panel), shape.hidden);
    layer.down = matrix(shape.hidden, shape.ffn);
    layer.input_norm.assign(hidden_stride_, 0.0f);
    layer.post_norm.assign(hidden_stride_, 0.0f);
    if (shape.qk_norm) {
      layer.q_norm.assign(padded_head(), 0.0f);
      layer.k_norm.assign(padded_head(), 0.0f);
    }
    layer.window = shape.windows[i];
    require(layer.window >= 0, "a window must not be negative");
  }
}

size_t Decoder::weight_bytes() const {
  size_t bytes = head_.bytes() + embed_.bytes();
  for (const Layer& layer : layers_) {
    bytes += layer.qkv.bytes() + layer.o.bytes() + layer.gate_up.bytes() + layer.down.bytes();
  }
  return bytes;
}

Decoder::Layer& Decoder::layer_at(int layer) {
  require(layer >= 0 && layer < shape_.layers, among("layer", layer, shape_.layers));
  return layers_[layer];
}

Decoder::Place<Matrix> Decoder::matrix_place(const std::string& part, int index) {
  if (part == "head" || (part == "embed" && shape_.tied)) return {&head_, shape_.vocab, 0, 1};
  if (part == "embed") return {&embed_, shape_.vocab, 0, 1};
  Layer& layer = layer_at(index);
  if (part == "q") return {&layer.qkv, q_width(), 0, 1};
  if (part == "k") return {&layer.qkv, kv_width(), q_width(), 1};
  if (part == "v") return {&layer.qkv, kv_width(), q_width() + kv_width(), 1};
  if (part == "o") return {&layer.o, shape_.hidden, 0, 1};
  if (part == "gate") return {&layer.gate_up, shape_.ffn, 0, 2};
  if (part == "up") return {&layer.gate_up, shape_.ffn, kernels_.panel, 2};
  if (part == "down") return {&layer.down, shape_.hidden, 0, 1};
  throw std::invalid_argument("unknown matrix '" + part + "'");
}

Decoder::Place<std::vector<float>> Decoder::vector_place(const std::string& part, int index) {
  if (part == "final_norm") return {&final_norm_, shape_.hidden, 0, 1};
  Layer& layer = layer_at(index);
  if (part == "input_norm") return {&layer.input_norm, shape_.hidden, 0, 1};
  if (part == "post_norm") return {&layer.post_norm, shape_.hidden, 0, 1};
  if (part == "q_norm" && shape_.qk_norm) return {&layer.q_norm, shape_.head_dim, 0, 1};
  if (part == "k_norm" && shape_.qk_norm) return {&layer.k_norm, shape_.head_dim, 0, 1};
  if (part == "q_bias") return {&layer.qkv_bias, q_width(), 0, 1};
  if (part == "k_bias") return {&layer.qkv_bias, kv_width(), q_width(), 1};
  if (part == "v_bias") return {&layer.qkv_bias, kv_width(), q_width() + kv_width(), 1};
  if (part == "o_bias") return {&layer.o_bias, shape_.hidden, 0, 1};
  if (part == "gate_bias") return {&layer.gate_up_bias, shape_.ffn, 0, 2};
  if (part == "up_bias") return {&layer.gate_up_bias, shape_.ffn, kernels_.panel, 2};
  if (part == "down_bias") return {&layer.down_bias, shape_.hidden, 0, 1};
  throw std::invalid_argument("unknown vector '" + part + "'");
}

// Gate and up alternate panel by panel, so that one piece of work holds both factors of SwiGLU.
int Decoder::interleaved(int row, int first, int panel_stride) const {
  return first + row / kernels_.panel * kernels_.panel * panel_stride + row % kernels_.panel;
}

void Decoder::set_matrix(const std::string& part, int layer, const void* data, int rows, int columns) {
  const std::lock_guard<std::mutex> turn(one_pass_);
  const Place<Matrix> place = matrix_place(part, layer);
  require(rows == place.rows && columns == place.whole->columns(),
          part + " is [" + std::to_string(place.rows) + ", " + std::to_string(place.whole->columns()) + "], not [" +
              std::to_string(rows) + ", " + std::to_string(columns) + "]");
  place.whole->pack(team_, data, rows, [&](int row) { return interleaved(row, place.first, place.panel_stride); });
}

void Decoder::set_vector(const std::string& part, int layer, const float* data, int rows) {
  const std::lock_guard<std::mutex> turn(one_pass_);
  const Place<std::vector<float>> place = vector_place(part, layer);
  require(rows == place.rows, part + " has " + std::to_string(place.rows) + " values, not " + std::to_string(rows));
  // Norms exist from the start; a bias that is never set costs nothing.
  if (place.whole->empty()) place.whole->assign(std::max({hidden_stride_, qkv_stride_, 2 * ffn_stride_}), 0.0f);
  for (int row = 0; row < rows; ++row) (*place.whole)[interleaved(row, place.first, place.panel_stride)] = data[row];
}

void Decoder::check(const Pass& pass, const Pool& pool) const {
  require(pool.layers() == shape_.layers && pool.kv_heads() == shape_.kv_heads && pool.head_dim() == padded_head(),
          "the pool's pages are not of this model's shape");
  require(pass.rows > 0, "a pass without rows");
  for (int row = 0; row < pass.rows; ++row) {
    require(pass.tokens[row] >= 0 && pass.tokens[row] < shape_.vocab, among("token", pass.tokens[row], shape_.vocab));
    require(pass.positions[row] >= 0 && pass.positions[row] < pass.context,
            among("position", pass.positions[row], pass.context));
    require(pool.usable_slot(pass.slots[row]), "slot " + std::to_string(pass.slots[row]) + " is not in use");
  }
  for (int i = 0; i < pass.logit_count; ++i) {
    const int row = pass.logit_rows[i];
    require(row >= 0 && row < pass.rows, among("logit row", row, pass.rows));
  }
  int row = 0;
  for (const SegmentInput& segment : pass.segments) {
    require(segment.start == row && segment.rows > 0 && segment.rows <= pass.rows - row,
            "segments must cover the rows in order");
    require(std::equal(segment.positions, segment.positions + segment.rows, pass.positions + row),
            "a segment's positions are not the pass's");
    if (pass.mass) {
      const int last = *std::max_element(segment.positions, segment.positions + segment.rows);
      require(pass.mass_pages % vector_multiple == 0 && last / page_size < pass.mass_pages, "too few pages of mass");
    }
    row += segment.rows;
  }
  require(row == pass.rows, "segments must cover the rows in order");
}

void Decoder::reserve(const Pass& pass, const Pool& pool) {
  const size_t rows = pass.rows;
  buffers_.x.reserve(rows * hidden_stride_);
  buffers_.normed.reserve(rows * hidden_stride_);
  buffers_.qkv.reserve(rows * qkv_stride_);
  buffers_.attended.reserve(rows * padded(q_width()));
  buffers_.activated.reserve(rows * ffn_stride_);
  buffers_.operands.reserve(rows * operand_stride_ * arithmetic_.operand_bytes);
  buffers_.queries.reserve(rows * shape_.heads * padded_head() * kernels_.of(pool.type()).operand_bytes);
}

void Decoder::forward(const Pass& pass, Pool& pool) {
  const std::lock_guard<std::mutex> turn(one_pass_);
  const FlushDenormals flush;
  check(pass, pool);
  std::vector<SegmentPlan> plans;
  for (const SegmentInput& segment : pass.segments) plans.push_back(plan_segment(segment, pool, pass.context));
  reserve(pass, pool);
  attention_.prepare(std::move(plans), pool, pass.rows, pass.mass ? pass.mass_pages : 0, team_.size());
  embed(pass);
  for (int i = 0; i < shape_.layers; ++i) {
    const Layer& layer = layers_[i];
    normalise(layer.input_norm.data(), pass.rows);
    project_qkv(layer, pass.rows);
    rotate_and_store(layer, i, pass, pool);
    attend(layer, i, pass);
    add_projected(layer.o, layer.o_bias, pass.rows);
    normalise(layer.post_norm.data(), pass.rows);
    feed_forward(layer, pass.rows);
    add_projected(layer.down, layer.down_bias, pass.rows);
  }
  finish(pass);
}

// epilogue(first row, rows, first panel, products [panels][rows][panel]) for every block of rows and group of panels.
template <class Epilogue>
void Decoder::multiply(const Matrix& matrix, int rows, int panels_a_piece, const Epilogue& epilogue) {
  const int groups = matrix.panels() / panels_a_piece;
  team_.run(groups * ((rows + row_block - 1) / row_block), [&](int piece, int) {
    alignas(64) float products[2 * row_block * widest_panel];
    const int first = piece / groups * row_block, count = std::min(row_block, rows - first);
    const int panel = piece % groups * panels_a_piece;
    const char* x = buffers_.operands.data() + first * operand_stride_ * arithmetic_.operand_bytes;
    for (int i = 0; i < panels_a_piece; ++i) {
      arithmetic_.multiply(matrix.panel_data(panel + i), matrix.steps(), x, operand_stride_, count,
                           products + size_t(i) * count * kernels_.panel, kernels_.panel);
    }
    epilogue(first, count, panel, products);
  });
}

void Decoder::embed(const Pass& pass) {
  const Matrix& table = shape_.tied ? head_ : embed_;
  team_.run(pass.rows, size_t(pass.rows) * shape_.hidden * 16, [&](int row, int) {
    float* x = buffers_.x.data() + row * hidden_stride_;
    table.unpack_row(pass.tokens[row], x);
    std::fill(x + shape_.hidden, x + hidden_stride_, 0.0f);
  });
}

// The residual stream normalised, as operands of the next multiplication.
void Decoder::normalise(const float* weight, int rows) {
  team_.run(rows, rows * hidden_stride_, [&](int row, int) {
    float* normed = buffers_.normed.data() + row * hidden_stride_;
    kernels_.rms_norm(buffers_.x.data() + row * hidden_stride_, weight, shape_.hidden, shape_.norm_eps, normed);
    arithmetic_.round(normed, round_up(shape_.hidden, vector_multiple),
                      buffers_.operands.data() + row * operand_stride_ * arithmetic_.operand_bytes);
  });
}

void Decoder::round_rows(const float* x, size_t stride, int columns, int rows) {
  team_.run(rows, size_t(rows) * columns, [&](int row, int) {
    arithmetic_.round(x + row * stride, round_up(columns, vector_multiple),
                      buffers_.operands.data() + row * operand_stride_ * arithmetic_.operand_bytes);
  });
}

void Decoder::project_qkv(const Layer& layer, int rows) {
  const int width = kernels_.panel;
  multiply(layer.qkv, rows, 1, [&](int first, int count, int panel, float* products) {
    add_bias(products, layer.qkv_bias, panel * width, width, count);
    for (int row = 0; row < count; ++row) {
      std::memcpy(buffers_.qkv.data() + (first + row) * qkv_stride_ + panel * width, products + row * width,
                  width * sizeof(float));
    }
  });
}

void Decoder::rotate_and_store(const Layer& layer, int index, const Pass& pass, Pool& pool) {
  team_.run(pass.rows, pass.rows * qkv_stride_ * 4, [&](int row, int) { rotate_row(layer, index, pass, pool, row); });
}

void Decoder::rotate_row(const Layer& layer, int index, const Pass& pass, Pool& pool, int row) {
  const int head_dim = shape_.head_dim, group = shape_.heads / shape_.kv_heads;
  const PageKernels& cached = kernels_.of(pool.type());
  const float* q = buffers_.qkv.data() + row * qkv_stride_;
  const float* k = q + q_width();
  const float* v = k + kv_width();
  alignas(64) float head_q[longest_head] = {}, head_k[longest_head] = {}, head_v[longest_head] = {};  // zero behind
  for (int head = 0; head < shape_.heads; ++head) {
    std::copy_n(q + head * head_dim, head_dim, head_q);
    rotate_head(head_q, layer.q_norm, pass, row);
    if (pass.queries) {
      const size_t at = (size_t(row) * shape_.layers + index) * shape_.heads + head;
      std::copy_n(head_q, head_dim, pass.queries + at * head_dim);
    }
    const size_t query = (size_t(head / group) * pass.rows + row) * group + head % group;
    cached.round(head_q, padded_head(), buffers_.queries.data() + query * padded_head() * cached.operand_bytes);
  }
  for (int head = 0; head < shape_.kv_heads; ++head) {
    std::copy_n(k + head * head_dim, head_dim, head_k);
    std::copy_n(v + head * head_dim, head_dim, head_v);
    rotate_head(head_k, layer.k_norm, pass, row);
    pool.write(index, head, pass.slots[row], head_k, head_v);
  }
}

void Decoder::rotate_head(float* x, const std::vector<float>& norm, const Pass& pass, int row) const {
  const int half = shape_.head_dim / 2;
  const size_t angles = size_t(pass.positions[row]) * half;
  if (shape_.qk_norm) kernels_.rms_norm(x, norm.data(), shape_.head_dim, shape_.norm_eps, x);
  rotate(x, pass.cos + angles, pass.sin + angles, half);
}

void Decoder::attend(const Layer& layer, int index, const Pass& pass) {
  const size_t stride = padded(q_width());
  float* mass = pass.mass;
  if (mass) mass += size_t(index) * pass.rows * shape_.kv_heads * pass.mass_pages;
  attention_.run(team_, {index, layer.window, buffers_.queries.data(), buffers_.attended.data(), stride, mass});
  round_rows(buffers_.attended.data(), stride, q_width(), pass.rows);
}

// The operands times `matrix`, added to the residual stream.
void Decoder::add_projected(const Matrix& matrix, const std::vector<float>& bias, int rows) {
  const int width = kernels_.panel;
  multiply(matrix, rows, 1, [&](int first, int count, int panel, float* products) {
    add_bias(products, bias, panel * width, width, count);
    for (int row = 0; row < count; ++row) {
      float* x = buffers_.x.data() + (first + row) * hidden_stride_ + panel * width;
      for (int i = 0; i < width; ++i) x[i] += products[row * width + i];
    }
  });
}

// SwiGLU, as operands of the down projection.
void Decoder::feed_forward(const Layer& layer, int rows) {
  const int width = kernels_.panel;
  multiply(layer.gate_up, rows, 2, [&](int first, int count, int panel, float* products) {
    float* up = products + size_t(count) * width;
    add_bias(products, layer.gate_up_bias, panel * width, width, count);
    add_bias(up, layer.gate_up_bias, (panel + 1) * width, width, count);
    kernels_.swiglu(products, up, count * width, products);
    for (int row = 0; row < count; ++row) {
      std::memcpy(buffers_.activated.data() + (first + row) * ffn_stride_ + panel / 2 * width, products + row * width,
                  width * sizeof(float));
    }
  });
  round_rows(buffers_.activated.data(), ffn_stride_, shape_.ffn, rows);
}

void Decoder::finish(const Pass& pass) {
  normalise(final_norm_.data(), pass.rows);
  for (int row = 0; row < pass.rows; ++row) {
    std::memcpy(pass.hidden + size_t(row) * shape_.hidden, buffers_.normed.data() + row * hidden_stride_,
                shape_.hidden * sizeof(float));
  }
  for (int i = 0; i < pass.logit_count; ++i) {
    arithmetic_.round(buffers_.normed.data() + pass.logit_rows[i] * hidden_stride_,
                      round_up(shape_.hidden, vector_multiple),
                      buffers_.operands.data() + i * operand_stride_ * arithmetic_.operand_bytes);
  }
  const int width = kernels_.panel;
  multiply(head_, pass.logit_count, 1, [&](int first, int count, int panel, float* products) {
    const int columns = std::min(width, shape_.vocab - panel * width);
    for (int row = 0; row < count; ++row) {
      std::memcpy(pass.logits + size_t(first + row) * shape_.vocab + panel * width, products + row * width,
                  columns * sizeof(float));
    }
  });
}

}  // namespace tokenswift
