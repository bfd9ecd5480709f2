// The table of functions of this translation unit's ISA.
#pragma once

#include <algorithm>
#include <iterator>

#include "isa/kernels.h"
#include "math/blocks.h"
#include "math/gemm.h"
#include "math/narrow.h"
#include "math/page.h"
#include "math/page_bytes.h"
#include "math/rowwise.h"

namespace tokenswift {
namespace {

template <class Format>
ElementKernels element_kernels() {
  return {Format::operand_bytes, round_operands<Format>, multiply<Format>};
}

template <class Page>
PageKernels page_kernels() {
  using Operands = Values<typename Page::Dot>;
  return {1, Operands::operand_bytes, round_operands<Operands>, visit<Page>, best_score<Page>};
}

// Sets the functions that multiply bytes: weights in blocks, and pages of int8.
inline void multiply_bytes_here(Kernels& kernels) {
  const ElementKernels blocks[] = {
      element_kernels<Blocks<Element::q8>>(),     element_kernels<Blocks<Element::q4>>(),
      element_kernels<Blocks<Element::q4_0>>(),   element_kernels<Blocks<Element::q5_0>>(),
      element_kernels<Blocks<Element::q5_1>>(),   element_kernels<Blocks<Element::q4_k>>(),
      element_kernels<Blocks<Element::q5_k>>(),   element_kernels<Blocks<Element::q6_k>>(),
      element_kernels<Blocks<Element::iq4_nl>>(), element_kernels<Blocks<Element::iq4_xs>>()};
  static_assert(std::size(blocks) == element_count - int(Element::q8));
  std::copy(std::begin(blocks), std::end(blocks), kernels.elements + int(Element::q8));
  kernels.int8_pages = {query_block, query_value_bytes, round_query, visit_bytes, best_byte_score};
}

inline Kernels make_kernels(const char* name) {
  constexpr int panel = Isa::gemm_vectors * Isa::lanes;
  Kernels kernels{name,
                  nullptr,
                  panel,
                  Isa::gemm_rows,
                  {element_kernels<Values<Bf16Dot>>(), element_kernels<Values<F32Dot>>()},
                  page_kernels<PageOf<Bf16Dot>>(),
                  page_kernels<PageOf<F32Dot>>(),
                  {},
                  copy_page,
                  rms_norm,
                  swiglu,
                  geglu,
                  soft_cap,
                  softmax,
                  rotate,
                  merge,
                  normalise,
                  dot,
                  project,
                  powers,
                  sigma,
                  add_outer,
                  recall,
                  add_mass};
  multiply_bytes_here(kernels);
  return kernels;
}

}  // namespace
}  // namespace tokenswift
