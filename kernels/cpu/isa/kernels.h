// The table of functions that an ISA variant offers. One is chosen at run time. Everything outside the table is plain
// C++ that runs anywhere and computes no floating-point sum.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace tokenswift {

constexpr int page_size = 64;         // tokens
constexpr int vector_multiple = 16;   // floats; rows and heads are padded with zeros to a multiple of it
constexpr int longest_head = 512;     // values
constexpr int spare_rows = 15;        // rows of operands behind the last that products and visits may read and ignore
constexpr float no_maximum = -1e30f;  // the running maximum before any key; finite, so that differences are defined

// The type of a weight matrix. From q8 on, weights lie in blocks (formats.h).
enum class Element { bf16, f32, q8, q4, q4_0, q5_0, q5_1, q4_k, q5_k, q6_k, iq4_nl, iq4_xs };
constexpr int element_count = int(Element::iq4_xs) + 1;
constexpr bool in_blocks(Element e) { return e >= Element::q8; }

enum class PageType { bf16, f32, int8 };  // the type of cached keys and values

constexpr size_t bytes_of(Element e) { return e == Element::bf16 ? 2 : 4; }
constexpr int step_of(Element e) {
  return e == Element::bf16 ? 2 : 1;
}  // values of k that lie side by side when packed
constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// The running softmax of one query: weighted values, 16 partial sums of the weights, and the maximum (base 2) that they
// refer to. It lies in memory as [head_dim] values, [16] sums, [1] maximum, and padding to a cache line.
constexpr int sums_width = 16;
constexpr int state_floats(int head_dim) { return head_dim + sums_width + 16; }
constexpr int state_maximum(int head_dim) { return head_dim + sums_width; }

// The arguments of a visit, in which some queries meet one page of keys and values.
struct PageVisit {
  const char* block;  // a block as Pool lays it out, or a copy
  const char* next;   // the block visited next, for prefetching; this one where there is none
  int head_dim;       // a multiple of 16
  float scale;        // multiplies the scores; log2(e) is included
  float cap;          // makes cap * tanh(s / cap) of a scaled score s; log2(e) is included; 0 where there is no cap
  int queries;
  const void* q;     // operands of each query, as the kernels' `round` makes them
  float* state;      // [queries][state_floats(head_dim)]
  const int* first;  // [queries] lanes first .. last - 1 are visible; null when all are
  const int* last;
  float* mass;  // for each query the sum of exp2(score - maximum) over this page; null when not wanted
  float* mass_maximum;
  size_t mass_stride;  // floats from one query to the next
};

// Rounds n floats of activations or queries, a multiple of vector_multiple, to the operands that the type of the other
// factor is multiplied with.
using RoundOperands = void (*)(const float* x, int n, void* out);

// The arithmetic of one element type of weights.
struct ElementKernels {
  int operand_bytes;  // bytes of one value
  RoundOperands round;
  // out[rows][panel columns] = x[rows][steps * step] times one packed panel. Strides are in elements.
  void (*multiply)(const void* panel, int steps, const void* x, size_t x_stride, int rows, float* out,
                   size_t out_stride);
};

// The arithmetic of one type of cached keys and values. That of int8 serves the copies of pages that drafts read, too
// (page_copies.h).
struct PageKernels {
  int query_multiple, operand_bytes;  // a query is padded to a multiple of so many values, each of so many bytes
  RoundOperands round;
  void (*visit)(const PageVisit&);
  // Returns the largest product of the first query with a key of the page. Reads block, next, head_dim and q.
  float (*best_score)(const PageVisit&);

  size_t query_bytes(int head_dim) const { return size_t(round_up(head_dim, query_multiple)) * operand_bytes; }
};

struct Kernels {
  const char* name;
  void (*rest)();  // gives back what a thread has of the processor for this variant alone; null where that is nothing
  int panel;       // output columns of a packed panel
  int tile;        // rows that a product makes in one go over a panel
  ElementKernels elements[element_count];
  PageKernels bf16_pages, f32_pages, int8_pages;
  // Makes the int8 block of a block of bf16 (see Pool).
  void (*copy_page)(const char* block, int head_dim, char* out);
  // out = x / rms(x) * weight. n counts values. Buffers are padded with zeros to vector_multiple.
  void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* out);
  // out = silu(gate) * up. n is a multiple of vector_multiple.
  void (*swiglu)(const float* gate, const float* up, int n, float* out);
  // out = gelu(gate) * up, where gelu is its approximation with tanh. n is a multiple of vector_multiple.
  void (*geglu)(const float* gate, const float* up, int n, float* out);
  // x = cap * tanh(x / cap). n is a multiple of vector_multiple.
  void (*soft_cap)(float* x, int n, float cap);
  // out = the softmax of n values. out has room up to a multiple of vector_multiple.
  void (*softmax)(const float* x, int n, float* out);
  // Rotates the halves of x [2 * half] against each other, which is RoPE as in Hugging Face's checkpoints. out may be
  // x.
  void (*rotate)(const float* x, const float* cos, const float* sin, int half, float* out);
  // Merges the softmax state `part` into `state`.
  void (*merge)(float* state, const float* part, int head_dim);
  // out = the state's values / the sum of its weights.
  void (*normalise)(const float* state, int head_dim, float* out);
  // What memories of evicted keys are made and read with (engine/recall.h). Counts are multiples of vector_multiple.
  // Returns the sum of a[i] b[i].
  float (*dot)(const float* a, const float* b, int n);
  // out[f] = offset + the sum of x[i] table[i][f], where table is [n][features].
  void (*project)(const float* x, const float* table, int n, int features, float offset, float* out);
  // out = 2^(x - shift - top), for exponents up to 127. shift: [n], or null for zeros. out may be x.
  void (*powers)(const float* x, const float* shift, float top, int n, float* out);
  // out = elu(x) + 1, which is 2^(x log2(e)) below 0 and x + 1 above. out may be x.
  void (*sigma)(const float* x, int n, float* out);
  // values[f] += weights[f] times the vector x, where values is [features][n]. Here `features` is any number.
  void (*add_outer)(const float* weights, int features, const float* x, int n, float* values);
  // Makes a softmax state but for its maximum: the sums of weights[f] values[f] and of weights[f] keys[f].
  void (*recall)(const float* weights, const float* keys, const float* values, int features, int head_dim,
                 float* state);
  // out[i] += the share of page i in the softmax of `state`.
  void (*add_mass)(const float* state, int head_dim, const float* mass, const float* mass_maximum, int pages,
                   float* out);

  const ElementKernels& of(Element e) const { return elements[int(e)]; }
  const PageKernels& of(PageType type) const {
    return type == PageType::bf16 ? bf16_pages : type == PageType::f32 ? f32_pages : int8_pages;
  }
};

// Calls `rest` at the end of a pass for the thread that began it. That thread is the caller's, not ours.
struct RestAtEnd {
  const Kernels& kernels;
  ~RestAtEnd() {
    if (kernels.rest) kernels.rest();
  }
};

// Returns the variant named by `wanted`, or this machine's best one where that is empty. Throws std::invalid_argument
// for an unknown name, or one that this machine cannot run.
const Kernels& choose_kernels(const std::string& wanted);

// Returns the names of the variants that this machine can run, the best first: those that it has the instructions for,
// or those that emulate others.
std::string runnable_kernels(bool emulated);

}  // namespace tokenswift
