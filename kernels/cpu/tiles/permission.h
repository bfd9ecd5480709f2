// Whether this process may compute with the processor's tile registers.
#pragma once

#include <string>

namespace tokenswift {

// Asks the system for them the first time: on Linux a process has to. Where it returns false, it says why in *why,
// which may be null.
bool tiles_allowed(std::string* why);

}  // namespace tokenswift
