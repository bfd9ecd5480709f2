// Vectors of 8 floats: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "math/half.h"

namespace tokenswift {
namespace {

struct Isa {
  static constexpr int lanes = 8;
  static constexpr int gemm_rows = 4, gemm_vectors = 2;  // 8 accumulators and 4 widened columns take 12 of 16 registers
  static constexpr int block_rows = 4;
  static constexpr int page_rows = 4, page_vectors = 2;

  using Vec = __m256;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec splat(float x) { return _mm256_set1_ps(x); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
  static void store_first(float* p, Vec a) { *p = _mm256_cvtss_f32(a); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
  static Vec nearest(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // Returns a * 2^n for whole n up to 127, and zero for n of -127 and less.
  static Vec scale(Vec a, Vec n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(max(splat(-127.0f), n)), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }

  // Returns whether some lane of a is greater than b's. A lane with NaN is not.
  static bool any_greater(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }

  static float sum(Vec a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static Vec max_across(Vec a) {
    a = _mm256_max_ps(a, _mm256_permute2f128_ps(a, a, 1));
    a = _mm256_max_ps(a, _mm256_permute_ps(a, _MM_SHUFFLE(1, 0, 3, 2)));
    return _mm256_max_ps(a, _mm256_permute_ps(a, _MM_SHUFFLE(2, 3, 0, 1)));
  }

  static Vec keep(Vec a, Vec other, int start, int first, int last) {
    const __m256i index = _mm256_add_epi32(_mm256_set1_epi32(start), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
    const __m256i in = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), index),
                                           _mm256_cmpgt_epi32(_mm256_set1_epi32(last), index));
    return _mm256_blendv_ps(other, a, _mm256_castsi256_ps(in));
  }

  static Vec widen_even(const uint16_t* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(bits(p), 16)); }
  static Vec widen_odd(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_and_si256(bits(p), _mm256_set1_epi32(int(0xffff0000u))));
  }

  // Dot products of bytes, as in vec_avx512.h.
  using Wholes = __m256i;
  using Bytes = __m256i;
  static Wholes wholes(int32_t x) { return _mm256_set1_epi32(x); }
  static Vec to_floats(Wholes a) { return _mm256_cvtepi32_ps(a); }
  static Vec load_halfs(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  template <int left, int mask>
  static Bytes bits(Bytes a) {
    const Bytes moved =
        left < 0 ? _mm256_srli_epi16(a, left < 0 ? -left : 0) : _mm256_slli_epi16(a, left < 0 ? 0 : left);
    return _mm256_and_si256(moved, _mm256_set1_epi8(mask));
  }
  static Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
  static Bytes look_up(const uint8_t* sixteen, Bytes a) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), a);
  }
  static Bytes repeat(const void* four) {
    int32_t bytes;
    std::memcpy(&bytes, four, sizeof bytes);
    return _mm256_set1_epi32(bytes);
  }
#ifdef __AVXVNNI__
  using Unsigned = __m256i;
  using Signed = __m256i;
  static Unsigned unsigned_bytes(Bytes a) { return a; }
  static Signed signed_bytes(Bytes a) { return a; }
  static Wholes dot(Wholes a, Unsigned w, Signed x) { return _mm256_dpbusd_avx_epi32(a, w, x); }
  using Shorts = Wholes;
  static constexpr int short_dots(int) { return 8; }
  static Shorts shorts() { return _mm256_setzero_si256(); }
  static Shorts short_dot(Shorts a, Bytes w, Bytes x) { return dot(a, w, x); }
  static Wholes add_shorts(Wholes a, Shorts b) { return _mm256_add_epi32(a, b); }
#else
  struct Unsigned {
    __m256i even, odd;
  };
  using Signed = Unsigned;
  static Unsigned unsigned_bytes(Bytes a) {
    return {_mm256_and_si256(a, _mm256_set1_epi16(255)), _mm256_srli_epi16(a, 8)};
  }
  static Signed signed_bytes(Bytes a) {
    return {_mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), _mm256_srai_epi16(a, 8)};
  }
  static Wholes dot(Wholes a, Unsigned w, Signed x) {
    const __m256i even = _mm256_madd_epi16(w.even, x.even), odd = _mm256_madd_epi16(w.odd, x.odd);
    return in_turn(_mm256_add_epi32(_mm256_add_epi32(a, even), odd));
  }
  using Shorts = __m256i;
  static constexpr int short_dots(int bits) { return bits == 4 ? 8 : bits == 5 ? 4 : 2; }
  static Shorts shorts() { return _mm256_setzero_si256(); }
  static Shorts short_dot(Shorts a, Bytes w, Bytes x) {
    return in_turn(_mm256_add_epi16(a, _mm256_maddubs_epi16(w, x)));
  }
  static Wholes add_shorts(Wholes a, Shorts b) {
    return _mm256_add_epi32(a, _mm256_madd_epi16(b, _mm256_set1_epi16(1)));
  }
#endif
  // Stores 64 numbers as bytes, as in vec_avx512.h.
  static void store_fours(uint8_t* p, const Vec (&a)[8], Vec factor) {
    for (int half = 0; half < 2; ++half) {
      const auto whole = [&](int i) {
        return _mm256_castps_si256(_mm256_fmadd_ps(a[4 * half + i], factor, _mm256_set1_ps(rounding_bias)));
      };
      const __m256i low = _mm256_add_epi32(whole(0), _mm256_slli_epi32(whole(2), 8));
      const __m256i high = _mm256_add_epi32(_mm256_slli_epi32(whole(1), 16), _mm256_slli_epi32(whole(3), 24));
      // The four biases, moved as the numbers were.
      const __m256i biases = _mm256_set1_epi32(int(0x4b400000u + (0x4b400000u << 8) + (0x4b400000u << 16)));
      const __m256i bytes = _mm256_sub_epi32(_mm256_add_epi32(low, high), biases);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32 * half), bytes);
    }
  }
  // Returns 8 int8 values.
  static Vec widen(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }

  // Inlined early, because GCC otherwise takes the function for one without effect and drops the calls.
  __attribute__((always_inline)) static void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }

 private:
  // Returns a. GCC otherwise reorders sums of whole numbers, computes all products of a tile before it adds the first,
  // and keeps them in memory meanwhile.
  static __m256i in_turn(__m256i a) {
    asm("" : "+x"(a));
    return a;
  }
  static __m256i bits(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
};

}  // namespace
}  // namespace tokenswift
