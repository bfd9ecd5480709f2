// Whether this process may compute with the processor's tile registers.
#pragma once

#include <string>

namespace tokenswift {

// Asks the system for them the first time: on Linux a process has to. Where it returns false, it says why in *why,
// which may be null.
bool tiles_allowed(std::string* why);

// Returns why a processor's tile registers may not be used; empty where they may, or where there are none.
std::string refused_tiles();

}  // namespace tokenswift
