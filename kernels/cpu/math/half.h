// The bits of single floats: fp16 values, and rounding to whole numbers.
#pragma once

#include <cstdint>
#include <cstring>

namespace tokenswift {
namespace {  // a copy for each translation unit: see isa/vec.h

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// 1.5 * 2^23. The lowest bit of a float of this size counts 1. So adding it rounds an x of |x| < 2^22 to the nearest
// whole number, ties to even. The low bits of the sum are that number in two's complement, and subtracting it again
// leaves the number as a float.
constexpr float rounding_bias = 12582912.0f;

// Rounds to the nearest whole number, ties to even, for |x| < 2^22. Gives some other number beyond.
inline int32_t nearest_whole(float x) { return int32_t(float_bits(x + rounding_bias) - float_bits(rounding_bias)); }

// Subnormal fp16 values count, also where the processor flushes denormals: they are the scales of small weights.
inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ff;
  if (exponent == 0) return float_of_bits(sign | float_bits(float(fraction) * 5.9604644775390625e-8f));  // 2^-24
  return float_of_bits(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

// Rounds to the nearest fp16, ties to even. NaN stays NaN.
inline uint16_t float_to_half(float x) {
  const uint32_t sign = float_bits(x) >> 16 & 0x8000, magnitude = float_bits(x) & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and more
  if (magnitude < 0x38800000) {                                 // below 2^-14: whole multiples of 2^-24
    const float whole = float_of_bits(magnitude) * 16777216.0f + 8388608.0f;
    return uint16_t(sign | (float_bits(whole) - float_bits(8388608.0f)));
  }
  return uint16_t(sign | (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

}  // namespace
}  // namespace tokenswift
