// The tile registers of hardware.h in plain C++, with the same bits on every machine. A NaN stays a NaN, maybe another.
//
// The processor flushes denormals in products of bf16 whatever the thread's settings are, and so does this. Nothing
// depends on these settings, because no denormal is ever computed with: operands and sums are flushed as bits, a
// product is a single multiplication only where it is known to be normal, and a sum of normal floats that is tiny is
// exact, so that flushing it afterwards is the same. Other products are summed in double, see rounding.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "math/half.h"
#include "tiles/rounding.h"

namespace tokenswift {
namespace {

struct Tiles {
  static void use() {}
  static void rest() {}

  template <int t>
  static void zero() {
    std::memset(tile(t), 0, tile_bytes);
  }
  template <int t>
  static void load(const void* p, size_t stride) {
    for (int row = 0; row < rows; ++row) {
      std::memcpy(tile(t) + row * row_bytes, static_cast<const char*>(p) + row * stride, row_bytes);
    }
  }
  template <int t>
  static void store(void* p, size_t stride) {
    for (int row = 0; row < rows; ++row) {
      std::memcpy(static_cast<char*>(p) + row * stride, tile(t) + row * row_bytes, row_bytes);
    }
  }

  template <int c, int a, int b>
  static void dot_bf16() {
    static_assert(c != a && c != b && a != b, "the processor refuses this");
    Factors factors;
    widen(tile(b), factors);
    for (int row = 0; row < rows; ++row) {
      uint16_t left[2 * rows];
      std::memcpy(left, tile(a) + row * row_bytes, row_bytes);
      add_products(left, factors, tile(c) + row * row_bytes);
    }
  }
  template <int c, int a, int b>
  static void dot_signed_unsigned() {
    static_assert(c != a && c != b && a != b, "the processor refuses this");
    dot_bytes<int8_t, uint8_t>(tile(c), tile(a), tile(b));
  }
  template <int c, int a, int b>
  static void dot_unsigned_signed() {
    static_assert(c != a && c != b && a != b, "the processor refuses this");
    dot_bytes<uint8_t, int8_t>(tile(c), tile(a), tile(b));
  }

 private:
  static constexpr int rows = 16, columns = 16, row_bytes = 64, tile_bytes = rows * row_bytes;
  static constexpr uint32_t sign = 0x80000000, exponent = 0x7f800000;

  // The sixteen factors of each k of tile b as fp32, and the least and the greatest exponent of those that are not 0.
  struct Factors {
    alignas(64) float of[2 * rows][columns];
    int least[2 * rows], greatest[2 * rows];
  };

  static unsigned char* tile(int t) {
    alignas(64) static thread_local unsigned char tiles[8][tile_bytes];
    return tiles[t];
  }

  static uint32_t flushed(uint32_t bits) { return bits & (sign | -uint32_t((bits & exponent) != 0)); }
  static float flushed(float x) { return float_of_bits(flushed(float_bits(x))); }

  static void widen(const unsigned char* b, Factors& out) {
    for (int row = 0; row < rows; ++row) {
      uint32_t pairs[columns];
      std::memcpy(pairs, b + row * row_bytes, sizeof pairs);
      for (int odd = 0; odd < 2; ++odd) {
        const int k = 2 * row + odd;
        int least = 254, greatest = 0;
        for (int j = 0; j < columns; ++j) {
          const uint32_t bits = flushed(odd ? pairs[j] & 0xffff0000 : pairs[j] << 16);
          const int size = int(bits >> 23 & 255);
          least = size && size < least ? size : least;
          greatest = size > greatest ? size : greatest;
          out.of[k][j] = float_of_bits(bits);
        }
        out.least[k] = least;
        out.greatest[k] = greatest;
      }
    }
  }

  // Adds the products of one row of tile a, [32], with all columns to that row of tile c.
  static void add_products(const uint16_t* a, const Factors& b, unsigned char* c) {
    alignas(64) float sums[2][columns] = {}, out[columns];
    for (int k = 0; k < 2 * rows; ++k) {
      const uint32_t bits = flushed(uint32_t(a[k]) << 16);
      const float left = float_of_bits(bits);
      const int size = int(bits >> 23 & 255);
      // All products are 0, or at least 2^-126 and less than 2^128.
      const bool normal =
          size + b.greatest[k] <= 380 && size < 255 && b.greatest[k] < 255 && (size == 0 || size + b.least[k] >= 128);
      normal ? add_normal(left, b.of[k], sums[k % 2]) : add_any(left, b.of[k], sums[k % 2]);
    }
    std::memcpy(out, c, sizeof out);
    for (int j = 0; j < columns; ++j) out[j] = flushed(flushed(out[j]) + flushed(sums[0][j] + sums[1][j]));
    std::memcpy(c, out, sizeof out);
  }

  // A product of two bf16 values has 16 bits, and is exact where it is neither too large nor too small.
  static void add_normal(float a, const float* __restrict b, float* __restrict sums) {
    for (int j = 0; j < columns; ++j) sums[j] = flushed(a * b[j] + sums[j]);
  }
  static void add_any(float a, const float* __restrict b, float* __restrict sums) {
    for (int j = 0; j < columns; ++j) {
      const double sum = add_to_odd(double(a) * double(b[j]), double(sums[j]));
      sums[j] = std::fabs(sum) < rounds_to_it ? std::copysign(0.0f, float(sum)) : to_single(sum);
    }
  }

  template <class Left, class Right>
  static void dot_bytes(unsigned char* c, const unsigned char* a, const unsigned char* b) {
    for (int row = 0; row < rows; ++row, a += row_bytes, c += row_bytes) {
      uint32_t sums[columns];  // unsigned, so that they may wrap
      std::memcpy(sums, c, sizeof sums);
      for (int k = 0; k < row_bytes; ++k) {
        const int left = Left(a[k]);
        const unsigned char* right = b + k / 4 * row_bytes + k % 4;
        for (int j = 0; j < columns; ++j) sums[j] += uint32_t(left * int(Right(right[4 * j])));
      }
      std::memcpy(c, sums, sizeof sums);
    }
  }
};

}  // namespace
}  // namespace tokenswift
