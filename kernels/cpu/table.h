// The table of this translation unit's ISA.
#pragma once

#include "blocks.h"
#include "gemm.h"
#include "kernels.h"
#include "page.h"
#include "rowwise.h"

namespace tokenswift {
namespace {

template <class Format>
ElementKernels element_kernels(void (*visit)(const PageVisit&)) {
  return {Format::operand_bytes, round_operands<Format>, multiply<Format>, visit};
}

Kernels make_kernels(const char* name) {
  constexpr int panel = Isa::gemm_vectors * Isa::lanes;
  return {name,
          panel,
          element_kernels<Values<Bf16Dot>>(visit_page<Bf16Dot>),
          element_kernels<Values<F32Dot>>(visit_page<F32Dot>),
          element_kernels<Blocks<Q8>>(nullptr),
          element_kernels<Blocks<Q4>>(nullptr),
          rms_norm,
          swiglu,
          merge,
          normalise,
          add_mass};
}

}  // namespace
}  // namespace tokenswift
