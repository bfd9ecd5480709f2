// The parts of the module, each of which is bound in a file of its own, and the arrays that they take.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>

namespace tokenswift {

template <class T, int N>
using Array = nanobind::ndarray<T, nanobind::ndim<N>, nanobind::c_contig, nanobind::device::cpu>;
using Ints = Array<const int32_t, 1>;
using Table = Array<const float, 2>;

void bind_memory(nanobind::module_& m);
void bind_sampler(nanobind::module_& m);
void bind_tiles(nanobind::module_& m);

}  // namespace tokenswift
