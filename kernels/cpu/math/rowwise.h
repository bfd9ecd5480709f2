// The functions that are computed row by row: exponentials, norms, activations, merging of softmax states.
#pragma once

#include <cmath>

#include "isa/kernels.h"
#include "math/dot.h"

namespace tokenswift {
namespace {

// Returns 2^t for finite t <= 127. It is exactly 1 at 0 and exactly 0 far below -127. The polynomials are minimax for
// 2^f over f in [-1/2, 1/2] with constant term 1. The short one is for results that are rounded to bf16's 8 bits
// afterwards.
enum class Precision { full, short_ };  // relative error 1e-7, 1e-4

template <Precision precision = Precision::full>
inline Vec exp2(Vec t) {
  const Vec n = Isa::nearest(t);
  const Vec f = Isa::sub(t, n);
  if constexpr (precision == Precision::short_) {
    Vec p = Isa::splat(0.05500892549753189f);
    p = Isa::fma(p, f, Isa::splat(0.2422109693288803f));
    p = Isa::fma(p, f, Isa::splat(0.6932829022407532f));
    return Isa::scale(Isa::fma(p, f, Isa::splat(1.0f)), n);
  }
  Vec p = Isa::splat(0.001326472614891827f);
  p = Isa::fma(p, f, Isa::splat(0.009671512991189957f));
  p = Isa::fma(p, f, Isa::splat(0.05550733581185341f));
  p = Isa::fma(p, f, Isa::splat(0.24022242426872253f));
  p = Isa::fma(p, f, Isa::splat(0.6931470036506653f));
  p = Isa::fma(p, f, Isa::splat(1.0f));
  return Isa::scale(p, n);
}

inline void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  Vec squares = Isa::zero();
  const int padded = round_up(n, vector_multiple);
  for (int i = 0; i < padded; i += Isa::lanes) squares = Isa::fma(Isa::load(x + i), Isa::load(x + i), squares);
  const Vec inverse = Isa::splat(1.0f / std::sqrt(Isa::sum(squares) / float(n) + eps));
  for (int i = 0; i < padded; i += Isa::lanes) {
    Isa::store(out + i, Isa::mul(Isa::load(weight + i), Isa::mul(Isa::load(x + i), inverse)));
  }
}

inline void swiglu(const float* gate, const float* up, int n, float* out) {
  const Vec minus_log2e = Isa::splat(-1.4426950408889634f), one = Isa::splat(1.0f), top = Isa::splat(127.0f);
  for (int i = 0; i < n; i += Isa::lanes) {
    const Vec x = Isa::load(gate + i);
    const Vec power = exp2(Isa::min(top, Isa::mul(x, minus_log2e)));
    Isa::store(out + i, Isa::mul(Isa::div(x, Isa::add(one, power)), Isa::load(up + i)));
  }
}

// Computes gelu(x) = x (1 + tanh u) / 2 as x / (1 + exp(-2 u)), where u = sqrt(2 / pi) (x + 0.044715 x^3).
inline void geglu(const float* gate, const float* up, int n, float* out) {
  const Vec linear = Isa::splat(-2.3022082f), cubic = Isa::splat(-0.10294324f);  // coefficients of -2 u log2(e)
  const Vec one = Isa::splat(1.0f), top = Isa::splat(127.0f), bottom = Isa::splat(-200.0f);
  for (int i = 0; i < n; i += Isa::lanes) {
    const Vec x = Isa::load(gate + i);
    const Vec square = Isa::mul(x, x);
    const Vec power = exp2(Isa::max(bottom, Isa::min(top, Isa::mul(x, Isa::fma(square, cubic, linear)))));
    Isa::store(out + i, Isa::mul(Isa::div(x, Isa::add(one, power)), Isa::load(up + i)));
  }
}

constexpr float minus_two_log2e = -2.8853900817779268f;

// Returns cap * tanh(y), where `power_of` = -2 log2(e) y: tanh(y) = (1 - p) / (1 + p) for p = exp(-2 y). The result is
// exactly +-cap where |y| is large, and NaN where it is NaN. Its absolute error is about 1e-7 cap.
inline Vec capped(Vec power_of, Vec cap) {
  const Vec one = Isa::splat(1.0f), top = Isa::splat(64.0f), bottom = Isa::splat(-64.0f);
  const Vec power = exp2(Isa::max(bottom, Isa::min(top, power_of)));
  return Isa::div(Isa::mul(cap, Isa::sub(one, power)), Isa::add(one, power));
}

inline void soft_cap(float* x, int n, float cap) {
  const Vec factor = Isa::splat(minus_two_log2e / cap), limit = Isa::splat(cap);
  for (int i = 0; i < n; i += Isa::lanes) Isa::store(x + i, capped(Isa::mul(Isa::load(x + i), factor), limit));
}

inline void softmax(const float* x, int n, float* out) {
  const int padded = round_up(n, vector_multiple);
  float largest = x[0];
  for (int i = 1; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  for (int i = 0; i < padded; ++i) out[i] = i < n ? (x[i] - largest) * 1.4426950408889634f : -1000.0f;
  Vec sums = Isa::zero();
  for (int i = 0; i < padded; i += Isa::lanes) {
    const Vec power = exp2(Isa::load(out + i));
    Isa::store(out + i, power);
    sums = Isa::add(sums, power);
  }
  const Vec total = Isa::splat(Isa::sum(sums));
  for (int i = 0; i < padded; i += Isa::lanes) Isa::store(out + i, Isa::div(Isa::load(out + i), total));
}

// Rotates without fused multiply-adds, so that every ISA gives the same bits.
inline void rotate(const float* x, const float* cos, const float* sin, int half, float* out) {
  int i = 0;
  for (; i + Isa::lanes <= half; i += Isa::lanes) {
    const Vec first = Isa::load(x + i), second = Isa::load(x + i + half);
    const Vec c = Isa::load(cos + i), s = Isa::load(sin + i);
    Isa::store(out + i, Isa::sub(Isa::mul(first, c), Isa::mul(second, s)));
    Isa::store(out + i + half, Isa::add(Isa::mul(second, c), Isa::mul(first, s)));
  }
  for (; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    out[i] = first * cos[i] - second * sin[i];
    out[i + half] = second * cos[i] + first * sin[i];
  }
}

// Merges `part` into `state`. Where one of them has seen nothing, the other's bits stay as they are.
inline void merge(float* state, const float* part, int head_dim) {
  const int at = state_maximum(head_dim);
  const Vec old = Isa::splat(state[at]), other = Isa::splat(part[at]);
  const Vec top = Isa::max(old, other);
  const Vec keep = exp2(Isa::sub(old, top)), add = exp2(Isa::sub(other, top));
  for (int i = 0; i < head_dim + sums_width; i += Isa::lanes) {
    Isa::store(state + i, Isa::fma(Isa::load(state + i), keep, Isa::mul(Isa::load(part + i), add)));
  }
  state[at] = state[at] > part[at] ? state[at] : part[at];
}

inline float sum_of_weights(const float* state, int head_dim) {
  Vec sums = Isa::load(state + head_dim);
  for (int i = Isa::lanes; i < sums_width; i += Isa::lanes) sums = Isa::add(sums, Isa::load(state + head_dim + i));
  return Isa::sum(sums);
}

inline void normalise(const float* state, int head_dim, float* out) {
  const Vec total = Isa::splat(sum_of_weights(state, head_dim));
  for (int i = 0; i < head_dim; i += Isa::lanes) Isa::store(out + i, Isa::div(Isa::load(state + i), total));
}

inline float dot(const float* a, const float* b, int n) {
  Vec sums = Isa::zero();
  for (int i = 0; i < n; i += Isa::lanes) sums = Isa::fma(Isa::load(a + i), Isa::load(b + i), sums);
  return Isa::sum(sums);
}

inline void project(const float* x, const float* table, int n, int features, float offset, float* out) {
  for (int f = 0; f < features; f += Isa::lanes) Isa::store(out + f, Isa::splat(offset));
  for (int i = 0; i < n; ++i) {
    const Vec factor = Isa::splat(x[i]);
    const float* row = table + size_t(i) * features;
    for (int f = 0; f < features; f += Isa::lanes) {
      Isa::store(out + f, Isa::fma(factor, Isa::load(row + f), Isa::load(out + f)));
    }
  }
}

inline void powers(const float* x, const float* shift, float top, int n, float* out) {
  for (int i = 0; i < n; i += Isa::lanes) {
    const Vec exponent = shift ? Isa::sub(Isa::load(x + i), Isa::load(shift + i)) : Isa::load(x + i);
    Isa::store(out + i, exp2(Isa::sub(exponent, Isa::splat(top))));
  }
}

inline void sigma(const float* x, int n, float* out) {
  const Vec zero = Isa::zero(), log2e = Isa::splat(1.4426950408889634f);
  for (int i = 0; i < n; i += Isa::lanes) {
    const Vec value = Isa::load(x + i);
    Isa::store(out + i, Isa::add(Isa::max(value, zero), exp2(Isa::mul(Isa::min(value, zero), log2e))));
  }
}

inline void add_outer(const float* weights, int features, const float* x, int n, float* values) {
  for (int f = 0; f < features; ++f, values += n) {
    const Vec weight = Isa::splat(weights[f]);
    for (int i = 0; i < n; i += Isa::lanes) {
      Isa::store(values + i, Isa::fma(weight, Isa::load(x + i), Isa::load(values + i)));
    }
  }
}

inline void recall(const float* weights, const float* keys, const float* values, int features, int head_dim,
                   float* state) {
  for (int i = 0; i < head_dim + sums_width; i += Isa::lanes) Isa::store(state + i, Isa::zero());
  for (int f = 0; f < features; ++f) {
    const Vec weight = Isa::splat(weights[f]);
    const float* row = values + size_t(f) * head_dim;
    for (int i = 0; i < head_dim; i += Isa::lanes) {
      Isa::store(state + i, Isa::fma(weight, Isa::load(row + i), Isa::load(state + i)));
    }
  }
  float* sums = state + head_dim;
  for (int f = 0; f < features; f += sums_width) {
    for (int i = 0; i < sums_width; i += Isa::lanes) {
      Isa::store(sums + i, Isa::fma(Isa::load(weights + f + i), Isa::load(keys + f + i), Isa::load(sums + i)));
    }
  }
}

// Adds each page's share of the softmax to `out`. The buffers are padded to whole vectors.
inline void add_mass(const float* state, int head_dim, const float* mass, const float* mass_maximum, int pages,
                     float* out) {
  const Vec top = Isa::splat(state[state_maximum(head_dim)]);
  const Vec share = Isa::splat(1.0f / sum_of_weights(state, head_dim));
  for (int i = 0; i < pages; i += Isa::lanes) {
    const Vec weight = Isa::mul(exp2(Isa::sub(Isa::load(mass_maximum + i), top)), share);
    Isa::store(out + i, Isa::fma(Isa::load(mass + i), weight, Isa::load(out + i)));
  }
}

}  // namespace
}  // namespace tokenswift
