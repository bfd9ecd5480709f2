// How wrong arguments are refused, in the engine and where Python calls it.
#pragma once

#include <sstream>
#include <stdexcept>

namespace tokenswift {

template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(const Parts&... what) {
  std::ostringstream message;
  (message << ... << what);
  throw std::invalid_argument(message.str());
}

// Throws std::invalid_argument, which Python sees as ValueError, unless the condition holds. what: the parts of the
// message. They are joined only when it is thrown, for most conditions stand in loops over rows and slots.
template <class... Parts>
void require(bool condition, const Parts&... what) {
  if (!condition) refuse(what...);
}

}  // namespace tokenswift
