// Single bf16 values, for code that reads or writes them one at a time.
#pragma once

#include <cstdint>
#include <cstring>

namespace tokenswift {
namespace {  // a copy for each translation unit: see isa/vec.h

inline float to_float(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds to the nearest bf16, ties to even. NaN stays NaN.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace
}  // namespace tokenswift
