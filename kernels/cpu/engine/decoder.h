// The whole pass of a decoder, for every family.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "engine/attention.h"
#include "isa/kernels.h"
#include "engine/head_rows.h"
#include "engine/matrix.h"
#include "engine/memory.h"
#include "engine/plan.h"
#include "engine/pool.h"
#include "engine/team.h"

namespace tokenswift {

constexpr int row_multiple = 32;  // values of whole panels on every ISA, and of whole vectors in every kernel
constexpr int row_block = 96;     // rows of one piece of a multiplication; whole tiles on every ISA
constexpr int widest_panel = 32;

struct Shape {
  int vocab = 0, hidden = 0, ffn = 0, layers = 0, heads = 0, kv_heads = 0, head_dim = 0;
  float norm_eps = 0;
  bool tied = false, qk_norm = false;
  std::vector<int> windows;   // [layers], 0 where a layer has full attention
  std::vector<int> ropes;     // [layers] tables that rotate: 0 for the pass's, 1 for its local ones, -1 for none
  std::vector<int> mixtures;  // [layers], 1 where the feed-forward is a mixture of experts
  bool post_norms = false;    // whether outputs of attention and feed-forward are normed before they are added
  bool gelu = false;          // whether the gate's activation is gelu, approximated with tanh; else it is silu
  float embedding_scale = 1;
  double score_scale = 1;                   // factor on attention's scores, beyond head_dim ** -0.5
  double attention_cap = 0, logit_cap = 0;  // soft caps of attention's scaled scores and of logits; 0 is none
  // A mixture's experts: how many there are, how many a row takes, their columns, and the columns of the shared one
  // that every row takes (0 where there is none). normalised_shares: whether the shares of a row's experts sum to 1.
  int experts = 0, chosen = 0, expert_ffn = 0, shared_ffn = 0;
  bool normalised_shares = false;
};

// The arguments of one pass. The caller owns all arrays.
struct Pass {
  int rows = 0;
  const int32_t* tokens = nullptr;     // [rows]
  const float* stream = nullptr;       // [rows][hidden] residual stream that the layers begin with; null embeds tokens
  const int32_t* positions = nullptr;  // [rows]
  const int32_t* slots = nullptr;      // [rows] slots that keys and values are written to
  std::vector<SegmentInput> segments;  // consecutive, covering all rows
  bool int8_pages = false;             // whether full pages are read as int8 copies where the pool holds bf16
  const int32_t* logit_rows = nullptr;
  int logit_count = 0;
  int context = 0;            // positions are less than it
  RopeTables rope;            // tables of `context` positions
  RopeTables local;           // tables of layers with a base of their own, of `context` positions, without shifts
  float* hidden = nullptr;    // [rows][hidden] after the final norm
  float* residual = nullptr;  // [rows][hidden] before the final norm
  float* logits = nullptr;    // [logit_count][vocab]
  float* mass = nullptr;      // [layers][rows][kv_heads][mass_pages], zeros at first; null when not wanted
  int mass_pages = 0;
  float* queries = nullptr;         // [rows][layers][heads][head_dim] as attention takes them; null when not wanted
  const int32_t* tapped = nullptr;  // [tap_count] layers, ascending
  int tap_count = 0;
  float* taps = nullptr;  // [rows][tap_count][hidden] residual stream that enters each of these layers
  // The tokens whose logits are computed. The others' are minus infinity. Null is all.
  const HeadRows* chosen = nullptr;
};

// A decoder with its packed weights. The residual stream, norms, scores and sums are fp32. The other factor of a bf16
// weight, key or value is rounded to bf16 on the ISA that has bf16 dot products, and stays fp32 on the others.
class Decoder {
 public:
  // weights: bf16, f32, or q8 for weights in blocks, where each matrix has the blocks that it was set to. Throws
  // std::invalid_argument for shapes that the kernels cannot run.
  Decoder(const Shape& shape, Element weights, const Kernels& kernels, std::shared_ptr<Team> team);
  Decoder(const Decoder&) = delete;

  const Kernels& kernels() const { return kernels_; }
  const Shape& shape() const { return shape_; }
  // The bytes of all packed matrices, and of those that every token is multiplied with.
  size_t weight_bytes() const { return matrix_bytes(true) + embed_.weight.bytes(); }
  size_t multiplied_bytes() const { return matrix_bytes(false); }
  size_t head_bytes() const { return head_.weight.bytes(); }

  // Sets a matrix. part: embed, head, q, k, v, o, gate, up, down. A mixture has experts.N.gate, up and down,
  // shared.gate, up and down, router, and shared_gate. source: values of the decoder's element type, or values or
  // blocks for a decoder of q8. The router and shared_gate take fp32 alone. fewest: whether values are packed in blocks
  // of 4 bits where those suffice. Returns the element type that the matrix has now. Throws std::invalid_argument for
  // unknown parts, wrong shapes and wrong types.
  Element set_matrix(const std::string& part, int layer, const MatrixSource& source, bool fewest = false);

  // Sets a norm or a bias. part: input_norm, post_norm (before the feed-forward), final_norm, q_norm, k_norm,
  // attention_norm and ffn_norm (after attention and feed-forward), or NAME_bias of every matrix but embed, head,
  // router and shared_gate. data: [rows]. Throws std::invalid_argument for unknown parts and wrong sizes.
  void set_vector(const std::string& part, int layer, const float* data, int rows);

  // Computes a pass. Throws std::invalid_argument before anything is computed or written. Calls from several threads
  // take turns.
  void forward(const Pass& pass, Pool& pool);

  // Computes what follows the layers alone: hidden, residual and logits of pass.stream.
  void close(const Pass& pass);

  // Computes the logits [rows][vocab] of rows of `hidden` as a pass returns them. A row's logits have the bits that
  // they had in that pass.
  void project(const float* hidden, int rows, float* logits);

  // Makes a choice of the head's rows for passes of this decoder, which has to outlive it. room: as in HeadRows.
  std::unique_ptr<HeadRows> head_rows(int room) const;

  // Finds the least and greatest keys of `count` pages in use, on the decoder's threads. low, high:
  // [layers][kv_heads][pool.pages()][width], written at the pages' own numbers.
  void key_bounds(const Pool& pool, const int32_t* pages, int count, int width, float* low, float* high);

  // Finds for each of `count` pages in use the largest product of a key with the query of its layer and head. queries:
  // [layers][kv_heads][pool.head_dim()]. out: [layers][kv_heads][count].
  void key_scores(const Pool& pool, const int32_t* pages, int count, const float* queries, float* out);

  // Folds `count` pages in use into a memory of this decoder's shape. rope, local: as in Pass, tables of `context`
  // positions. The other arguments are those of Recall::fold. Throws std::invalid_argument before anything is folded.
  void fold(Recall& recall, const Pool& pool, const int32_t* numbers, const int32_t* pages, int count,
            const RopeTables& rope, const RopeTables& local, int context, const float* shifts);

  // Copies the keys of `count` pages in use, of one layer. out: [kv_heads][count][page_size][width].
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
    FeedForward dense;                 // empty in a mixture
    std::vector<FeedForward> experts;  // empty in a dense layer
    FeedForward shared;                // empty where there is no shared expert
    Linear router, shared_gate;        // fp32
    std::vector<float> input_norm, post_norm, q_norm, k_norm, attention_norm, ffn_norm;
    int window = 0, rope = 0;
  };

  // The activations of one pass. Rows are padded to whole panels.
  struct Buffers {
    Buffer<float> x, normed, qkv, attended, activated;
    Buffer<float> added;          // rows to be added to x, where they are not added at once
    Buffer<char> operands;        // operands of the weights' element type, for the next multiplication
    Buffer<char> queries;         // operands of the pool's page type
    Buffer<float> plain_queries;  // queries before RoPE, where they are moved for far keys
    Buffer<char> copy_queries;    // operands of the pool's copies
    Buffer<float> asking;         // queries as memories take them, where a segment has one
  };

  // The rows' ways through a mixture. Each (row, expert) pair has a place. Places are ordered by expert, then by row.
  struct Routes {
    std::vector<int> experts, places;  // [rows][chosen], with a row's experts ascending
    std::vector<float> shares;         // [rows][chosen]
    std::vector<int> sources;          // [rows * chosen] row at each place
    struct Run {
      int expert, first, rows;
    };
    std::vector<Run> runs;  // runs of places of one expert, at most row_block long
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
  void check(const Recall& recall) const;
  void reserve(const Pass& pass, const Pool& pool);
  char* operands(int row) const;
  void round(const float* x, int columns, int row) { arithmetic_.round(x, columns, operands(row)); }
  void embed(const Pass& pass);
  void load(const Pass& pass);
  void tap(const Pass& pass, int layer) const;
  void normalise(const float* weight, int rows);
  void add_normalised(const std::vector<float>& weight, int rows);
  void round_rows(const float* x, size_t stride, int columns, int rows);
  void project_qkv(const Layer& layer, int rows);
  void rotate_and_store(const Layer& layer, int index, const Pass& pass, Pool& pool);
  void rotate_row(const Layer& layer, int index, const Pass& pass, Pool& pool, int row);
  size_t copy_query_bytes() const { return kernels_.int8_pages.query_bytes(padded_head()); }
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
  void project_chosen(const HeadRows& chosen, int rows, float* logits);

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
  Linear embed_, head_;  // embed_ is empty where the head is tied, and serves as the embedding too
  std::vector<float> final_norm_;
  std::vector<Layer> layers_;
  size_t hidden_stride_, qkv_stride_, ffn_stride_, operand_stride_, score_stride_;  // elements from row to row
  Buffers buffers_;
  std::vector<const Recall*> recalls_;  // [rows] memory that a row reads, or null
  Routes routes_;
  Attention attention_;
  std::shared_ptr<Team> team_;
};

// Calls work(panel, first row, rows, room for the products of two panels) for every panel and block of rows.
template <class Work>
void Decoder::share(int rows, int panels, const Work& work) {
  team_->run(panels * ((rows + row_block - 1) / row_block), [&](int piece, int) {
    alignas(64) float products[2 * row_block * widest_panel];
    const int first = piece / panels * row_block;
    work(piece % panels, first, std::min(row_block, rows - first), products);
  });
}

}  // namespace tokenswift
