// Single steps of fp32 arithmetic in doubles, with the bits of x86's instructions.
//
// An exact result is rounded once to fp32, to nearest even. Where denormals are flushed, x86 asks whether a result is
// tiny after it was rounded to 24 bits of an unbounded exponent, and aarch64 asks before. They differ for results of
// just less than 2^-126 that round to it. So here such a result becomes 2^-126 before it is narrowed. Everything else
// is then the same with denormals flushed and without, on both. No double here is ever denormal itself.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace tokenswift {
namespace {  // a copy for each translation unit: see isa/vec.h

constexpr double least_normal = 0x1p-126;                 // of fp32
constexpr double rounds_to_it = least_normal - 0x1p-151;  // and everything above does

// Returns a + b rounded to odd: where the sum is not exact, it is the neighbour whose last bit is one. So rounding it
// again, to a float, gives the float that is nearest to the exact sum.
inline double add_to_odd(double a, double b) {
  const double sum = a + b, of_b = sum - a;
  const double error = (a - (sum - of_b)) + (b - of_b);  // exact, or NaN where the sum is not finite
  uint64_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  const uint64_t even = ~bits & 1;
  bits += error * sum > 0 ? even : error * sum < 0 ? -even : 0;
  double odd;
  std::memcpy(&odd, &bits, sizeof odd);
  return odd;
}

// Rounds to fp32 what is exact, rounded to odd, or a quotient or a product of two floats in double.
inline float to_single(double x) {
  const double size = std::fabs(x);
  return float(size >= rounds_to_it && size < least_normal ? std::copysign(least_normal, x) : x);
}

// Returns a b + c. The product of two floats is exact in double.
inline float fused(float a, float b, float c) { return to_single(add_to_odd(double(a) * double(b), double(c))); }

}  // namespace
}  // namespace tokenswift
