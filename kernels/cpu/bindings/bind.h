// Parts of the module, each bound where its types are known.
#pragma once

#include <nanobind/nanobind.h>

namespace tokenswift {

void bind_sampler(nanobind::module_& m);

}  // namespace tokenswift
