// Vectors of 16 floats in plain C++, with the bits of vec_avx512.h on every machine. A NaN stays a NaN, maybe another.
//
// Sums are single additions: where one is tiny it is exact. Products, quotients and fused multiply-adds are computed in
// double (rounding.h), because not every machine fuses, and not every one flushes as x86 does. The compiler makes of
// these loops what vectors the target has. It is kept from making them anew in every unrolled product: it would take
// ten minutes. For the same reason products take one row at a time.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "math/half.h"
#include "tiles/rounding.h"

namespace tokenswift {
namespace {

struct Isa {
  static constexpr int lanes = 16;
  static constexpr int gemm_rows = 1, gemm_vectors = 2;  // the panels of vec_avx512.h
  static constexpr int block_rows = 1;
  static constexpr int page_rows = 1, page_vectors = 4;

  struct Vec {
    float of[lanes];
  };

  static Vec zero() { return Vec{}; }
  static Vec splat(float x) {
    return each([&](int) { return x; });
  }
  static Vec load(const float* p) { return from<Vec>(p); }
  static void store(float* p, Vec a) { std::memcpy(p, &a, sizeof a); }
  static void store_first(float* p, Vec a) { std::memcpy(p, &a, sizeof *p); }
  [[gnu::noinline]] static Vec add(Vec a, Vec b) {
    return each([&](int i) { return a.of[i] + b.of[i]; });
  }
  [[gnu::noinline]] static Vec sub(Vec a, Vec b) {
    return each([&](int i) { return a.of[i] - b.of[i]; });
  }
  [[gnu::noinline]] static Vec mul(Vec a, Vec b) {
    return each([&](int i) { return to_single(double(a.of[i]) * double(b.of[i])); });
  }
  [[gnu::noinline]] static Vec div(Vec a, Vec b) {
    return each([&](int i) { return to_single(double(a.of[i]) / double(b.of[i])); });
  }
  [[gnu::noinline]] static Vec fma(Vec a, Vec b, Vec c) {
    return each([&](int i) { return fused(a.of[i], b.of[i], c.of[i]); });
  }
  [[gnu::noinline]] static Vec max(Vec a, Vec b) {
    return each([&](int i) { return a.of[i] > b.of[i] ? a.of[i] : b.of[i]; });
  }
  [[gnu::noinline]] static Vec min(Vec a, Vec b) {
    return each([&](int i) { return a.of[i] < b.of[i] ? a.of[i] : b.of[i]; });
  }
  [[gnu::noinline]] static Vec nearest(Vec a) {
    return each([&](int i) {
      const float size = std::fabs(a.of[i]);  // from 2^23 on all floats are whole
      return size < 8388608.0f ? std::copysign((size + 8388608.0f) - 8388608.0f, a.of[i]) : a.of[i];
    });
  }
  [[gnu::noinline]] static Vec scale(Vec a, Vec n) {
    return each([&](int i) {
      const float least = -400.0f, most = 400.0f;  // too small for any float, and too large
      const float bounded = n.of[i] < least ? least : n.of[i] < most ? n.of[i] : most;
      const uint64_t bits = uint64_t(1023 + int(bounded)) << 52;
      return n.of[i] == n.of[i] ? to_single(double(a.of[i]) * from<double>(&bits)) : n.of[i];
    });
  }

  [[gnu::noinline]] static bool any_greater(Vec a, Vec b) {
    bool any = false;
    for (int i = 0; i < lanes; ++i) any |= a.of[i] > b.of[i];
    return any;
  }

  [[gnu::noinline]] static float sum(Vec a) {
    for (int half = lanes / 2; half; half /= 2) {
      for (int i = 0; i < half; ++i) a.of[i] += a.of[i + half];
    }
    return a.of[0];
  }
  [[gnu::noinline]] static Vec max_across(Vec a) {
    for (int half = lanes / 2; half; half /= 2) {
      a = max(a, each([&](int i) { return a.of[i ^ half]; }));
    }
    return a;
  }

  [[gnu::noinline]] static Vec keep(Vec a, Vec other, int start, int first, int last) {
    return each([&](int i) { return start + i >= first && start + i < last ? a.of[i] : other.of[i]; });
  }

  [[gnu::noinline]] static Vec widen_even(const uint16_t* p) {
    return each([&](int i) { return float_of_bits(uint32_t(p[2 * i]) << 16); });
  }
  [[gnu::noinline]] static Vec widen_odd(const uint16_t* p) {
    return each([&](int i) { return float_of_bits(uint32_t(p[2 * i + 1]) << 16); });
  }

  // Dot products of bytes, as with VNNI: sums of 32 bits that wrap.
  struct Wholes {
    uint32_t of[lanes];
  };
  struct Bytes {
    uint8_t of[4 * lanes];
  };
  using Unsigned = Bytes;
  using Signed = Bytes;
  static Wholes wholes(int32_t x) {
    Wholes out;
    for (uint32_t& whole : out.of) whole = uint32_t(x);
    return out;
  }
  [[gnu::noinline]] static Vec to_floats(Wholes a) {
    return each([&](int i) { return float(int32_t(a.of[i])); });
  }
  [[gnu::noinline]] static Wholes add_whole(const int32_t* p, int32_t x) {
    Wholes out;
    for (int i = 0; i < lanes; ++i) out.of[i] = uint32_t(p[i]) + uint32_t(x);
    return out;
  }
  [[gnu::noinline]] static Vec whole_floats(const int32_t* p) {
    return each([&](int i) { return float(p[i]); });
  }
  [[gnu::noinline]] static Vec load_halfs(const uint16_t* p) {
    return each([&](int i) { return half_to_float(p[i]); });
  }
  static Bytes load_bytes(const uint8_t* p) { return from<Bytes>(p); }
  template <int left, int mask>
  [[gnu::noinline]] static Bytes bits(Bytes a) {
    for (uint8_t& byte : a.of)
      byte = uint8_t((left < 0 ? byte >> (left < 0 ? -left : 0) : byte << (left < 0 ? 0 : left)) & mask);
    return a;
  }
  [[gnu::noinline]] static Bytes either(Bytes a, Bytes b) {
    for (int i = 0; i < 4 * lanes; ++i) a.of[i] |= b.of[i];
    return a;
  }
  [[gnu::noinline]] static Bytes look_up(const uint8_t* sixteen, Bytes a) {
    for (uint8_t& byte : a.of) byte = sixteen[byte & 15];
    return a;
  }
  [[gnu::noinline]] static Bytes repeat(const void* four) {
    Bytes out;
    for (int i = 0; i < lanes; ++i) std::memcpy(out.of + 4 * i, four, 4);
    return out;
  }
  static Unsigned unsigned_bytes(Bytes a) { return a; }
  static Signed signed_bytes(Bytes a) { return a; }
  [[gnu::noinline]] static Wholes dot(Wholes a, Unsigned w, Signed x) {
    for (int i = 0; i < 4 * lanes; ++i) a.of[i / 4] += uint32_t(int(w.of[i]) * int(int8_t(x.of[i])));
    return a;
  }
  using Shorts = Wholes;
  static constexpr int short_dots(int) { return 8; }
  static Shorts shorts() { return wholes(0); }
  static Shorts short_dot(Shorts a, Bytes w, Bytes x) { return dot(a, w, x); }
  [[gnu::noinline]] static Wholes add_shorts(Wholes a, Shorts b) {
    for (int i = 0; i < lanes; ++i) a.of[i] += b.of[i];
    return a;
  }
  // Stores 64 numbers as bytes, as in vec_avx512.h.
  [[gnu::noinline]] static void store_fours(uint8_t* p, const Vec (&a)[4], Vec factor) {
    for (int vector = 0; vector < 4; ++vector) {
      const Vec pushed = fma(a[vector], factor, splat(rounding_bias));
      // Number t or t + 8 of vector v goes to byte 32 (v / 2) + 4 t + v % 2, or to the one two further on.
      uint8_t* word = p + vector / 2 * 32 + vector % 2;
      for (int i = 0; i < lanes; ++i) word[i % 8 * 4 + i / 8 * 2] = uint8_t(float_bits(pushed.of[i]));
    }
  }
  // Returns 16 int8 values.
  [[gnu::noinline]] static Vec widen(const int8_t* p) {
    return each([&](int i) { return float(p[i]); });
  }

  // Inlined early, because GCC otherwise takes the function for one without effect and drops the calls.
  __attribute__((always_inline)) static void prefetch(const void* p) { __builtin_prefetch(p); }

 private:
  template <class F>
  static Vec each(F f) {
    Vec out;
    for (int i = 0; i < lanes; ++i) out.of[i] = f(i);
    return out;
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
