// Vectors of 4 floats, of GCC's and Clang's portable vector types. They become SSE2, NEON, or whatever the target has.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "math/half.h"

namespace tokenswift {
namespace {

struct Isa {
  static constexpr int lanes = 4;
  static constexpr int gemm_rows = 4, gemm_vectors = 2;
  static constexpr int block_rows = 4;
  static constexpr int page_rows = 4, page_vectors = 2;

  typedef float Vec __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef uint32_t Words __attribute__((vector_size(16)));

  static Vec zero() { return Vec{}; }
  static Vec splat(float x) { return Vec{x, x, x, x}; }
  static Vec load(const float* p) { return from<Vec>(p); }
  static void store(float* p, Vec a) { std::memcpy(p, &a, sizeof a); }
  static void store_first(float* p, Vec a) { *p = a[0]; }
  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec sub(Vec a, Vec b) { return a - b; }
  static Vec mul(Vec a, Vec b) { return a * b; }
  static Vec div(Vec a, Vec b) { return a / b; }
  // The sum is fused where the hardware fuses. Elsewhere there are two roundings, because a library call for each lane
  // costs 50 times as much.
  static Vec fma(Vec a, Vec b, Vec c) {
#if defined(__FP_FAST_FMAF)
    Vec r;
    for (int i = 0; i < lanes; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return r;
#else
    return a * b + c;
#endif
  }
  static Vec max(Vec a, Vec b) { return a > b ? a : b; }
  static Vec min(Vec a, Vec b) { return a < b ? a : b; }
  // Rounds for |a| < 2^22. Below that exp2 does not need it: scale() gives zero there for any n.
  static Vec nearest(Vec a) { return (a + rounding_bias) - rounding_bias; }
  // Returns a * 2^n for whole n up to 127, and zero for n of -127 and less.
  static Vec scale(Vec a, Vec n) {
    const Ints power = (__builtin_convertvector(max(splat(-127.0f), n), Ints) + 127) << 23;
    return a * from<Vec>(&power);
  }

  // Returns whether some lane of a is greater than b's. A lane with NaN is not.
  static bool any_greater(Vec a, Vec b) {
    const Ints greater = a > b;
    return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
  }

  static float sum(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
  static Vec max_across(Vec a) {
    const float even = a[0] > a[2] ? a[0] : a[2], odd = a[1] > a[3] ? a[1] : a[3];
    return splat(even > odd ? even : odd);
  }

  static Vec keep(Vec a, Vec other, int start, int first, int last) {
    const Ints index = Ints{0, 1, 2, 3} + start;
    return ((index >= first) & (index < last)) ? a : other;
  }

  static Vec widen_even(const uint16_t* p) {
    const Words wide = from<Words>(p) << 16;
    return from<Vec>(&wide);
  }
  static Vec widen_odd(const uint16_t* p) {
    const Words wide = from<Words>(p) & 0xffff0000u;
    return from<Vec>(&wide);
  }

  // Dot products of bytes. Whole numbers so small are exact as floats, and floats are multiplied faster than integers.
  using Wholes = Vec;
  using Bytes = Words;
  struct Unsigned {
    Vec of[4];
  };
  using Signed = Unsigned;
  static Wholes wholes(int32_t x) { return splat(float(x)); }
  static Vec to_floats(Wholes a) { return a; }
  static Vec load_halfs(const uint16_t* p) {
    return Vec{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
  }
  static Bytes load_bytes(const uint8_t* p) { return from<Words>(p); }
  template <int left, int mask>
  static Bytes bits(Bytes a) {
    return (left < 0 ? a >> (left < 0 ? -left : 0) : a << (left < 0 ? 0 : left)) & (mask * 0x01010101u);
  }
  static Bytes either(Bytes a, Bytes b) { return a | b; }
  static Bytes look_up(const uint8_t* sixteen, Bytes a) {
    uint8_t bytes[sizeof a];
    std::memcpy(bytes, &a, sizeof a);
    for (uint8_t& byte : bytes) byte = sixteen[byte];
    return from<Bytes>(bytes);
  }
  static Bytes repeat(const void* four) {
    uint32_t bytes;
    std::memcpy(&bytes, four, sizeof bytes);
    return Bytes{} + bytes;
  }
  static Unsigned unsigned_bytes(Bytes a) { return {{byte<0>(a), byte<1>(a), byte<2>(a), byte<3>(a)}}; }
  static Signed signed_bytes(Bytes a) {
    return {{signed_byte<0>(a), signed_byte<1>(a), signed_byte<2>(a), signed_byte<3>(a)}};
  }
  static Wholes dot(Wholes a, const Unsigned& w, const Signed& x) {
    for (int i = 0; i < 4; ++i) a = fma(w.of[i], x.of[i], a);
    return a;
  }
  using Shorts = Wholes;
  static constexpr int short_dots(int) { return 8; }
  static Shorts shorts() { return zero(); }
  static Shorts short_dot(Shorts a, Bytes w, Bytes x) { return dot(a, unsigned_bytes(w), signed_bytes(x)); }
  static Wholes add_shorts(Wholes a, Shorts b) { return a + b; }
  // Stores 64 numbers as bytes, as in vec_avx512.h.
  static void store_fours(uint8_t* p, const Vec (&a)[16], Vec factor) {
    for (int i = 0; i < 16; ++i) {
      const Vec pushed = fma(a[i], factor, splat(rounding_bias));
      const Words bits = from<Words>(&pushed);
      // Number 4 i + j is 32 h + 16 b + 8 c + t, and byte 32 h + 4 t + 2 c + b.
      uint8_t* word = p + i / 8 * 32 + i % 2 * 16 + i / 2 % 2 * 2 + i / 4 % 2;
      for (int j = 0; j < lanes; ++j) word[4 * j] = uint8_t(bits[j]);
    }
  }
  // Returns 4 int8 values.
  static Vec widen(const int8_t* p) { return Vec{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }

  // Inlined early, because GCC otherwise takes the function for one without effect and drops the calls.
  __attribute__((always_inline)) static void prefetch(const void* p) { __builtin_prefetch(p); }

 private:
  template <int index>
  static Vec byte(Bytes a) {
    return __builtin_convertvector(Ints(a >> (8 * index) & 0xffu), Vec);
  }
  template <int index>
  static Vec signed_byte(Bytes a) {
    return __builtin_convertvector(Ints(a << (24 - 8 * index)) >> 24, Vec);
  }
  template <class T>
  static T from(const void* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
};

}  // namespace
}  // namespace tokenswift
