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
  return {int(sizeof(typename Dot::Operand)), round_operands<Dot>, multiply<Dot>, visit_page<Dot>};
}

Kernels make_kernels(const char* name) {
  constexpr int panel = Isa::gemm_vectors * Isa::lanes;
  return {name,   panel, element_kernels<Bf16Dot>(), element_kernels<F32Dot>(), rms_norm,
          swiglu, merge, normalise,                  add_mass};
}

}  // namespace
}  // namespace tokenswift
