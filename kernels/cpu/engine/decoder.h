// The whole decoder pass of every family.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "engine/attention.h"
#include "isa/kernels.h"
#include "engine/matrix.h"
#include "engine/memory.h"
#include "engine/plan.h"
#include "engine/pool.h"
#include "engine/team.h"

namespace tokenswift {

constexpr int row_multiple = 32;  // whole panels of every ISA, whole vectors of every kernel
constexpr int row_block = 96;     // rows of one piece of a multiplication: whole tiles of every ISA
constexpr int widest_panel = 32;

struct Shape {
  int vocab = 0, hidden = 0, ffn = 0, layers = 0, heads = 0, kv_heads = 0, head_dim = 0;
  float norm_eps = 0;
  bool tied = false, qk_norm = false;
  std::vector<int> windows;   // [layers], 0 is full attention
  std::vector<int> ropes;     // [layers] which tables rotate: 0 the pass's, 1 its local ones, -1 none
  std::vector<int> mixtures;  // [layers], 1 where the feed-forward is a mixture of experts
  bool post_norms = false;    // what attention and feed-forward give is normed before it is added
  bool gelu = false;          // of the gate, by its approximation with tanh; else silu
  float embedding_scale = 1;
  // Of a mixture: how many there are, how many a row takes, their columns and those of one that every row takes (0:
  // none); and whether the shares of the chosen ones sum to 1.
  int experts = 0, chosen = 0, expert_ffn = 0, shared_ffn = 0;
  bool normalised_shares = false;
};

// One pass. All arrays are the caller's.
struct Pass {
  int rows = 0;
  const int32_t* tokens = nullptr;     // [rows]
  const int32_t* positions = nullptr;  // [rows]
  const int32_t* slots = nullptr;      // [rows] where keys and values go
  std::vector<SegmentInput> segments;  // consecutive, covering all rows
  bool int8_pages = false;             // read full pages as int8 where the pool holds bf16
  const int32_t* logit_rows = nullptr;
  int logit_count = 0;
  int context = 0;            // positions end before it
  RopeTables rope;            // of as many positions
  RopeTables local;           // of layers with a base of their own, as many; without shifts
  float* hidden = nullptr;    // [rows][hidden], after the final norm
  float* residual = nullptr;  // [rows][hidden], before it
  float* logits = nullptr;    // [logit_count][vocab]
  float* mass = nullptr;      // [layers][rows][kv_heads][mass_pages], zeros; null when not wanted
  int mass_pages = 0;
  float* queries = nullptr;  // [rows][layers][heads][head_dim] as attention takes them; null: not wanted
};

// Residual stream, norms, scores and sums are fp32. What a bf16 weight or a bf16 key or value is multiplied with is
// rounded to bf16 on the ISA that has bf16 dot products, and stays fp32 on the others.
class Decoder {
 public:
  // weights: q8 for those in blocks, each matrix in those that it was set to. Throws std::invalid_argument for shapes
  // that the kernels cannot run.
  Decoder(const Shape& shape, Element weights, const Kernels& kernels, std::shared_ptr<Team> team);
  Decoder(const Decoder&) = delete;

  const Kernels& kernels() const { return kernels_; }
  const Shape& shape() const { return shape_; }
  // Of the packed matrices: all, and those that every token is multiplied with.
  size_t weight_bytes() const { return matrix_bytes(true) + embed_.weight.bytes(); }
  size_t multiplied_bytes() const { return matrix_bytes(false); }

  // part: embed, head, q, k, v, o, gate, up, down; values in the decoder's element type, or what q8 can be made from.
  // Of a mixture experts.N.gate and so on, shared.gate and so on; and router, shared_gate, whose values are fp32. part:
  // input_norm, post_norm (before the feed-forward), final_norm, q_norm, k_norm, attention_norm, ffn_norm (behind
  // attention and feed-forward), q_bias, k_bias, v_bias, o_bias, gate_bias, up_bias, down_bias; data: [rows] fp32.
  // Throw std::invalid_argument for unknown parts and wrong shapes. fewest: in blocks of 4 bits where those suffice.
  // Returns what the matrix is now made of.
  Element set_matrix(const std::string& part, int layer, const MatrixSource& source, bool fewest = false);
  void set_vector(const std::string& part, int layer, const float* data, int rows);

  // Throws std::invalid_argument before anything is computed or written. Calls from several threads take turns.
  void forward(const Pass& pass, Pool& pool);

  // logits [rows][vocab] of hidden [rows][hidden] as a pass returns them: a row's have the bits they had there.
  void project(const float* hidden, int rows, float* logits);
  // Statistics of `count` pages in use, on the decoder's threads.
  // key_bounds: low, high are [layers][kv_heads][pool.pages()][width], written at the pages' own numbers.
  // key_scores: out is [layers][kv_heads][count], the largest product of a key with the query of its layer and head;
  // queries: [layers][kv_heads][pool.head_dim()].
  // page_keys: out is [kv_heads][count][page_size][width], of one layer.
  void key_bounds(const Pool& pool, const int32_t* pages, int count, int width, float* low, float* high);
  void key_scores(const Pool& pool, const int32_t* pages, int count, const float* queries, float* out);
  void page_keys(const Pool& pool, int layer, const int32_t* pages, int count, int width, float* out);

 private:
  struct Linear {
    Matrix weight;
    std::vector<float> bias;  // padded to whole panels; empty where there is none
  };

  struct FeedForward {
    Linear gate, up, down;
  };

  struct Layer {
    Linear q, k, v, o;
    FeedForward dense;                 // a mixture has none
    std::vector<FeedForward> experts;  // empty but of a mixture
    FeedForward shared;
    Linear router, shared_gate;  // fp32
    std::vector<float> input_norm, post_norm, q_norm, k_norm, attention_norm, ffn_norm;
    int window = 0, rope = 0;
  };

  // Activations of one pass, rows padded to whole panels.
  struct Buffers {
    Buffer<float> x, normed, qkv, attended, activated;
    Buffer<float> added;          // to x, where that is not at once
    Buffer<char> operands;        // of the weights' element type, for the next multiplication
    Buffer<char> queries;         // of the pool's
    Buffer<float> plain_queries;  // before RoPE, where they are moved for far keys
    Buffer<char> copy_queries;    // of its copies'
  };

  // A row's way through a mixture: it lies at `places` among the rows of its experts, by expert and then by row.
  struct Routes {
    std::vector<int> experts, places;  // [rows][chosen], a row's experts ascending
    std::vector<float> shares;         // [rows][chosen]
    std::vector<int> sources;          // [rows * chosen] the row at each place
    struct Run {
      int expert, first, rows;
    };
    std::vector<Run> runs;  // of places, of one expert each, at most row_block long
    Buffer<float> scores;   // [rows][score_stride]
    Buffer<float> activated, out;
    Buffer<char> operands;
  };

  size_t matrix_bytes(bool idle) const;
  Linear linear(int rows, int columns) const { return {Matrix(weights_, kernels_.panel, rows, columns), {}}; }
  FeedForward feed_forward_of(int ffn) const;
  Layer& layer_at(int layer);
  Linear& linear_at(const std::string& part, int layer);
  Linear& expert_linear(const std::string& part, Layer& layer);

  void check(const Pass& pass, const Pool& pool) const;
  void reserve(const Pass& pass, const Pool& pool);
  char* operands(int row) const;
  void round(const float* x, int columns, int row) { arithmetic_.round(x, columns, operands(row)); }
  void embed(const Pass& pass);
  void normalise(const float* weight, int rows);
  void add_normalised(const std::vector<float>& weight, int rows);
  void round_rows(const float* x, size_t stride, int columns, int rows);
  void project_qkv(const Layer& layer, int rows);
  void rotate_and_store(const Layer& layer, int index, const Pass& pass, Pool& pool);
  void rotate_row(const Layer& layer, int index, const Pass& pass, Pool& pool, int row);
  size_t copy_query_bytes() const { return kernels_.copies.query_bytes(padded_head()); }
  void normalise_head(float* x, const std::vector<float>& norm) const;
  void rotate_head(float* x, const Pass& pass, int row, int rope) const;
  bool moves(const Layer& layer, const Pass& pass) const {
    return layer.rope == 0 && pass.rope.shifts.serve(layer.window);
  }
  void attend(const Layer& layer, int index, const Pass& pass);
  void add_projected(const Linear& linear, int rows);
  void project_into_added(const Linear& linear, int rows);
  void feed_forward(const FeedForward& part, int rows);
  void gate_panel(const FeedForward& part, int panel, const char* x, int rows, float* products, float* out) const;
  void mix_experts(const Layer& layer, int rows);
  void route(const Layer& layer, int rows);
  void choose(int row, float* probabilities);
  void group_rows(int rows);
  void run_experts(const Layer& layer);
  void add_shared(const Layer& layer, int rows);
  void finish(const Pass& pass);
  void project_rounded(int rows, float* logits);

  template <class Work>
  void share(int rows, int panels, const Work& work);
  void multiply(const Linear& linear, int panel, const char* x, int rows, float* products) const;
  void multiply(const Linear& linear, int panel, int first, int rows, float* products) const {
    multiply(linear, panel, operands(first), rows, products);
  }

  int padded_head() const { return round_up(shape_.head_dim, vector_multiple); }
  int q_width() const { return shape_.heads * shape_.head_dim; }
  int kv_width() const { return shape_.kv_heads * shape_.head_dim; }

  Shape shape_;
  Element weights_;
  const Kernels& kernels_;
  const ElementKernels& arithmetic_;
  Linear embed_, head_;  // a tied head serves as the embedding too
  std::vector<float> final_norm_;
  std::vector<Layer> layers_;
  size_t hidden_stride_, qkv_stride_, ffn_stride_, operand_stride_, score_stride_;  // elements from row to row
  Buffers buffers_;
  Routes routes_;
  Attention attention_;
  std::shared_ptr<Team> team_;
};

// work(panel, first row, rows, room for the products of two panels), for every panel and block of rows.
template <class Work>
void Decoder::share(int rows, int panels, const Work& work) {
  team_->run(panels * ((rows + row_block - 1) / row_block), [&](int piece, int) {
    alignas(64) float products[2 * row_block * widest_panel];
    const int first = piece / panels * row_block;
    work(piece % panels, first, std::min(row_block, rows - first), products);
  });
}

}  // namespace tokenswift
