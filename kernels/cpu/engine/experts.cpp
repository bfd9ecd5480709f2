// Mixtures of experts: which feed-forwards a row takes, and their sum.
//
// A row's scores are products in fp32 with its normed values, which are not rounded. A row takes the experts of the
// largest probabilities, and among equal ones those of the lowest numbers. Each expert computes the rows that chose it.
// A row's result is the sum over its experts in ascending order of their numbers. So it does not depend on the rows
// beside it.
#include <algorithm>
#include <cstring>

#include "engine/decoder.h"

namespace tokenswift {

void Decoder::mix_experts(const Layer& layer, int rows) {
  route(layer, rows);
  group_rows(rows);
  run_experts(layer);
  const int chosen = shape_.chosen;
  team_->run(rows, rows * hidden_stride_, [&](int row, int) {
    float* added = buffers_.added.data() + row * hidden_stride_;
    std::fill_n(added, hidden_stride_, 0.0f);
    for (int i = row * chosen; i < (row + 1) * chosen; ++i) {
      const float* out = routes_.out.data() + routes_.places[i] * hidden_stride_;
      for (int column = 0; column < shape_.hidden; ++column) added[column] += routes_.shares[i] * out[column];
    }
  });
  if (shape_.shared_ffn) add_shared(layer, rows);
}

void Decoder::route(const Layer& layer, int rows) {
  const size_t count = size_t(rows) * shape_.chosen;
  routes_.experts.resize(count);
  routes_.shares.resize(count);
  routes_.scores.reserve(rows * score_stride_);
  const int width = kernels_.panel;
  const Matrix& router = layer.router.weight;
  share(rows, router.panels(), [&](int panel, int first, int block, float* products) {
    kernels_.of(Element::f32)
        .multiply(router.panel_data(panel), router.steps(), buffers_.normed.data() + first * hidden_stride_,
                  hidden_stride_, block, products, width);
    for (int row = 0; row < block; ++row) {
      std::memcpy(routes_.scores.data() + (first + row) * score_stride_ + panel * width, products + row * width,
                  width * sizeof(float));
    }
  });
  team_->run(rows, rows * score_stride_ * 16, [&](int row, int) {
    float* scores = routes_.scores.data() + row * score_stride_;
    kernels_.softmax(scores, shape_.experts, scores);
    choose(row, scores);
  });
}

// Chooses a row's experts and their shares. Overwrites the probabilities of the chosen ones.
void Decoder::choose(int row, float* probabilities) {
  int* experts = routes_.experts.data() + size_t(row) * shape_.chosen;
  float* shares = routes_.shares.data() + size_t(row) * shape_.chosen;
  float total = 0;
  for (int i = 0; i < shape_.chosen; ++i) {
    const int expert = int(std::max_element(probabilities, probabilities + shape_.experts) - probabilities);
    const float share = probabilities[expert];
    total += share;
    probabilities[expert] = -1;  // less than any probability
    int at = i;
    for (; at > 0 && experts[at - 1] > expert; --at) {
      experts[at] = experts[at - 1];
      shares[at] = shares[at - 1];
    }
    experts[at] = expert;
    shares[at] = share;
  }
  if (!shape_.normalised_shares) return;
  for (int i = 0; i < shape_.chosen; ++i) shares[i] /= total;
}

// Gives each (row, expert) pair its place: by expert, and among the rows of one expert in the order of the pass.
void Decoder::group_rows(int rows) {
  const int count = rows * shape_.chosen;
  std::vector<int> next(shape_.experts + 1, 0);
  for (int i = 0; i < count; ++i) ++next[routes_.experts[i] + 1];
  routes_.runs.clear();
  for (int expert = 0; expert < shape_.experts; ++expert) {
    next[expert + 1] += next[expert];
    for (int first = next[expert]; first < next[expert + 1]; first += row_block) {
      routes_.runs.push_back({expert, first, std::min(row_block, next[expert + 1] - first)});
    }
  }
  routes_.places.resize(count);
  routes_.sources.resize(count);
  for (int i = 0; i < count; ++i) {
    routes_.places[i] = next[routes_.experts[i]]++;
    routes_.sources[routes_.places[i]] = i / shape_.chosen;
  }
}

void Decoder::run_experts(const Layer& layer) {
  const int places = int(routes_.sources.size()), runs = int(routes_.runs.size()), width = kernels_.panel;
  const size_t bytes = operand_stride_ * arithmetic_.operand_bytes;
  routes_.operands.reserve((places + spare_rows) * bytes);
  routes_.activated.reserve(places * ffn_stride_);
  routes_.out.reserve(places * hidden_stride_);
  team_->run(places, places * hidden_stride_, [&](int place, int) {
    std::memcpy(routes_.operands.data() + place * bytes, operands(routes_.sources[place]), bytes);
  });
  const auto each = [&](int panels, const auto& work) {
    team_->run(runs * panels, [&](int piece, int) {
      alignas(64) float products[2 * row_block * widest_panel];
      const Routes::Run& run = routes_.runs[piece / panels];
      work(layer.experts[run.expert], piece % panels, run, routes_.operands.data() + run.first * bytes, products);
    });
  };
  each(layer.experts[0].gate.weight.panels(),
       [&](const FeedForward& expert, int panel, const Routes::Run& run, const char* x, float* products) {
         gate_panel(expert, panel, x, run.rows, products, routes_.activated.data() + run.first * ffn_stride_);
       });
  team_->run(places, places * ffn_stride_, [&](int place, int) {
    arithmetic_.round(routes_.activated.data() + place * ffn_stride_, shape_.expert_ffn,
                      routes_.operands.data() + place * bytes);
  });
  each(layer.experts[0].down.weight.panels(),
       [&](const FeedForward& expert, int panel, const Routes::Run& run, const char* x, float* products) {
         multiply(expert.down, panel, x, run.rows, products);
         for (int row = 0; row < run.rows; ++row) {
           std::memcpy(routes_.out.data() + (run.first + row) * hidden_stride_ + panel * width, products + row * width,
                       width * sizeof(float));
         }
       });
}

// Adds the feed-forward that every row takes, times the sigmoid of its gate. The sigmoid of x is computed as the first
// value of softmax(x, 0).
void Decoder::add_shared(const Layer& layer, int rows) {
  const int width = kernels_.panel;
  const Matrix& gate = layer.shared_gate.weight;
  routes_.scores.reserve(rows * size_t(row_multiple));
  team_->run(rows, rows * hidden_stride_, [&](int row, int) {
    alignas(64) float products[widest_panel] = {};
    kernels_.of(Element::f32)
        .multiply(gate.panel_data(0), gate.steps(), buffers_.normed.data() + row * hidden_stride_, hidden_stride_, 1,
                  products, width);
    products[1] = 0;
    kernels_.softmax(products, 2, routes_.scores.data() + row * size_t(row_multiple));
  });
  feed_forward(layer.shared, rows);
  share(rows, layer.shared.down.weight.panels(), [&](int panel, int first, int count, float* products) {
    multiply(layer.shared.down, panel, first, count, products);
    for (int row = 0; row < count; ++row) {
      const float opened = routes_.scores[(first + row) * size_t(row_multiple)];
      float* added = buffers_.added.data() + (first + row) * hidden_stride_ + panel * width;
      for (int i = 0; i < width; ++i) added[i] += opened * products[row * width + i];
    }
  });
}

}  // namespace tokenswift
