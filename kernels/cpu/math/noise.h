// Noise that belongs to a position. It follows the specification of tokenswift_py/sampling/noise.py bit for bit. All
// products and sums are rounded one by one, because the build forbids contraction.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

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

// Returns ln x of a positive normal double as e ln 2 + 2 s (1 + s^2/3 + ... + s^20/21), where x = 2^e m and
// s = (m - 1) / (m + 1).
inline double log_polynomial(double x) {
  int e;
  double m = std::frexp(x, &e);
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
  const double n = std::nearbyint(x / ln2), r = x - n * ln2;
  double series = reciprocals[13];
  for (int k = 12; k >= 0; --k) series = series * r + reciprocals[k];
  return std::ldexp(series, int(n));
}

inline double gumbel(uint64_t seed, uint32_t position, uint32_t token, uint32_t stream) {
  constexpr uint32_t token_domain = 0;
  const uint32_t x = philox({position, token / 4, stream, token_domain}, seed)[token % 4];
  const double u = (double(x) + 0.5) * 0x1p-32;
  return -log_polynomial(-log_polynomial(u));
}

}  // namespace tokenswift
