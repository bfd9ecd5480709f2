// The table of this translation unit's ISA.
#pragma once

#include "gemm.h"
#include "kernels.h"
#include "page.h"
#include "rowwise.h"

namespace tokenswift {
namespace {

template <class Dot>
ElementKernels element_kernels() {
  return {int(sizeof(typename Dot::Operand)), round_operands<Dot>, multiply<Dot>};
}

template <class Page>
PageKernels page_kernels() {
  using Dot = typename Page::Dot;
  return {int(sizeof(typename Dot::Operand)), round_operands<Dot>, visit_page<Page>, best_score<Page>};
}

Kernels make_kernels(const char* name) {
  constexpr int panel = Isa::gemm_vectors * Isa::lanes;
  return {name,
          panel,
          element_kernels<Bf16Dot>(),
          element_kernels<F32Dot>(),
          page_kernels<PageOf<Bf16Dot>>(),
          page_kernels<PageOf<F32Dot>>(),
          page_kernels<PageOf<Bf16Dot, int8_t>>(),
          rms_norm,
          swiglu,
          merge,
          normalise,
          add_mass};
}

}  // namespace
}  // namespace tokenswift
