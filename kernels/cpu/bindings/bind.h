// The parts of the module. Each is bound in a file of its own.
#pragma once

#include <nanobind/nanobind.h>

namespace tokenswift {

void bind_memory(nanobind::module_& m);
void bind_sampler(nanobind::module_& m);

}  // namespace tokenswift
