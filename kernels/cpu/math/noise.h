// Noise that belongs to a position. It follows the specification of tokenswift_py/sampling/noise.py bit for bit. All
// products and sums are rounded one by one, because the build forbids contraction.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace tokenswift {

// Philox4x32-10 (Salmon et al. 2011).
inline std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, uint64_t key) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c[0], p1 = uint64_t(0xCD9E8D57u) * c[2];
    c = {uint32_t(p1 >> 32) ^ c[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ k1, uint32_t(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

constexpr double ln2 = 0.6931471805599453;
constexpr double sqrt_half = 0.7071067811865476;

inline uint64_t bits_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline double double_of(uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Returns ln x of a positive normal double as e ln 2 + 2 s (1 + s^2/3 + ... + s^20/21), where x = 2^e m and
// s = (m - 1) / (m + 1).
inline double log_polynomial(double x) {
  const uint64_t bits = bits_of(x);
  int e = int(bits >> 52) - 1022;  // m is in [1/2, 1), as frexp has it
  double m = double_of((bits & 0x000F'FFFF'FFFF'FFFF) | uint64_t(1022) << 52);
  if (m < sqrt_half) {
    m = m + m;
    --e;
  }
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double series = 1.0 / 21.0;
  for (int k = 9; k >= 0; --k) series = series * z + 1.0 / (2 * k + 1);
  return e * ln2 + (s + s) * series;
}

// Returns e^x of a double in [-700, 700] as 2^n (1 + r + ... + r^13 / 13!), where n = rint(x / ln 2) and
// r = x - n ln 2.
inline double exp_polynomial(double x) {
  static const std::array<double, 14> reciprocals = [] {
    std::array<double, 14> values{1.0};
    for (int k = 1; k < 14; ++k) values[k] = values[k - 1] / k;
    return values;
  }();
  constexpr double rounder = 0x1.8p52;  // what is added to it is rounded to a whole number, as rint does
  const double n = (x / ln2 + rounder) - rounder, r = x - n * ln2;
  double series = reciprocals[13];
  for (int k = 12; k >= 0; --k) series = series * r + reciprocals[k];
  return series * double_of(uint64_t(int64_t(n) + 1023) << 52);  // by 2^n, which is normal
}

// Returns the noise that belongs to a draw of 32 bits. It rises with the draw.
inline double gumbel(uint32_t draw) {
  const double u = (double(draw) + 0.5) * 0x1p-32;
  return -log_polynomial(-log_polynomial(u));
}

// Returns a draw below which the noise is less than `noise`, for all of [0, 32). It is rounded down: the bound is that
// of the multiple of 1/8 below.
inline uint32_t least_draw(double noise) {
  static const std::array<uint32_t, 256> draws = [] {
    std::array<uint32_t, 256> values{};
    for (int i = 0; i < 256; ++i) {
      // The inverse of the noise, for a little less than i / 8, so that no error of the polynomials counts.
      const double u = std::exp(-std::exp(1e-6 - i / 8.0));
      values[i] = uint32_t(std::max(0.0, std::floor(u * 0x1p32) - 1.0));
    }
    return values;
  }();
  return draws[std::min(255, int(noise * 8.0))];
}

// The draws of a position's tokens, four of which come from one call of Philox. Neighbours are best asked for in a row.
class Draws {
 public:
  Draws(uint64_t seed, uint32_t position, uint32_t stream) : seed_(seed), position_(position), stream_(stream) {}

  uint32_t operator()(uint32_t token) {
    constexpr uint32_t token_domain = 0;
    if (token / 4 != group_) {
      group_ = token / 4;
      draws_ = philox({position_, group_, stream_, token_domain}, seed_);
    }
    return draws_[token % 4];
  }

 private:
  uint64_t seed_;
  uint32_t position_, stream_, group_ = UINT32_MAX;  // tokens are less than 2^31
  std::array<uint32_t, 4> draws_{};
};

}  // namespace tokenswift
