// Vectors of 16 floats: AVX-512 F/BW/VL/DQ, with VNNI where the compiler's target has it.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "math/half.h"

namespace tokenswift {
namespace {

struct Isa {
  static constexpr int lanes = 16;
  static constexpr int gemm_rows = 12, gemm_vectors = 2;  // 24 accumulators take 24 of 32 registers
  static constexpr int block_rows = 6;                    // registers hold as many sums of whole numbers beside
  static constexpr int page_rows = 6, page_vectors = 4;

  using Vec = __m512;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec splat(float x) { return _mm512_set1_ps(x); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
  static void store_first(float* p, Vec a) { *p = _mm512_cvtss_f32(a); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  // Return the second operand where one of them is NaN.
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
  static Vec nearest(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // Returns a * 2^n for whole n, and zero where that is too small for a float.
  static Vec scale(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }

  // Returns whether some lane of a is greater than b's. A lane with NaN is not.
  static bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }

  // Compute the sum and the maximum of all lanes in one fixed tree.
  static float sum(Vec a) { return _mm512_reduce_add_ps(a); }
  static Vec max_across(Vec a) {
    a = _mm512_max_ps(a, _mm512_shuffle_f32x4(a, a, _MM_SHUFFLE(1, 0, 3, 2)));
    a = _mm512_max_ps(a, _mm512_shuffle_f32x4(a, a, _MM_SHUFFLE(2, 3, 0, 1)));
    a = _mm512_max_ps(a, _mm512_permute_ps(a, _MM_SHUFFLE(1, 0, 3, 2)));
    return _mm512_max_ps(a, _mm512_permute_ps(a, _MM_SHUFFLE(2, 3, 0, 1)));
  }

  // Returns a where first <= index < last, and `other` elsewhere. Lane j has index start + j.
  static Vec keep(Vec a, Vec other, int start, int first, int last) {
    const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(start),
                                           _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    const __mmask16 in = _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(first)) &
                         _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(last));
    return _mm512_mask_blend_ps(in, other, a);
  }

  // Return the even and the odd elements of 32 bf16 values, widened exactly.
  static Vec widen_even(const uint16_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
  static Vec widen_odd(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(0xffff0000u))));
  }

  // Dot products of bytes. The four bytes of every column are multiplied with four bytes that all columns share.
  using Wholes = __m512i;
  using Bytes = __m512i;
  static Wholes wholes(int32_t x) { return _mm512_set1_epi32(x); }
  // Returns 16 whole numbers plus another one.
  static Wholes add_whole(const int32_t* p, int32_t x) { return _mm512_add_epi32(_mm512_loadu_si512(p), wholes(x)); }
  // Returns 16 whole numbers as floats.
  static Vec whole_floats(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
  static Vec to_floats(Wholes a) { return _mm512_cvtepi32_ps(a); }
  static Vec load_halfs(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  // Moves the bits of every byte to the left and masks them. The mask keeps no bit of a neighbouring byte.
  template <int left, int mask>
  static Bytes bits(Bytes a) {
    const Bytes moved =
        left < 0 ? _mm512_srli_epi16(a, left < 0 ? -left : 0) : _mm512_slli_epi16(a, left < 0 ? 0 : left);
    return _mm512_and_si512(moved, _mm512_set1_epi8(mask));
  }
  static Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
  // Returns the bytes of a table at these places, 0 .. 15.
  static Bytes look_up(const uint8_t* sixteen, Bytes a) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), a);
  }
  static Bytes repeat(const void* four) {
    int32_t bytes;
    std::memcpy(&bytes, four, sizeof bytes);
    return _mm512_set1_epi32(bytes);
  }
#ifdef __AVX512VNNI__
  using Unsigned = __m512i;
  using Signed = __m512i;
  static Unsigned unsigned_bytes(Bytes a) { return a; }
  static Signed signed_bytes(Bytes a) { return a; }
  static Wholes dot(Wholes a, Unsigned w, Signed x) { return _mm512_dpbusd_epi32(a, w, x); }
  // Sums of dot products in 16 bits, where these are faster. short_dots: how many fit, with weights of `bits` bits.
  using Shorts = Wholes;
  static constexpr int short_dots(int) { return 8; }
  static Shorts shorts() { return _mm512_setzero_si512(); }
  static Shorts short_dot(Shorts a, Bytes w, Bytes x) { return dot(a, w, x); }
  static Wholes add_shorts(Wholes a, Shorts b) { return _mm512_add_epi32(a, b); }
#else
  // Even and odd bytes as 16-bit values, because instructions on bytes saturate.
  struct Unsigned {
    __m512i even, odd;
  };
  using Signed = Unsigned;
  static Unsigned unsigned_bytes(Bytes a) {
    return {_mm512_and_si512(a, _mm512_set1_epi16(255)), _mm512_srli_epi16(a, 8)};
  }
  static Signed signed_bytes(Bytes a) {
    return {_mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8), _mm512_srai_epi16(a, 8)};
  }
  static Wholes dot(Wholes a, Unsigned w, Signed x) {
    const __m512i even = _mm512_madd_epi16(w.even, x.even), odd = _mm512_madd_epi16(w.odd, x.odd);
    return in_turn(_mm512_add_epi32(_mm512_add_epi32(a, even), odd));
  }
  using Shorts = __m512i;
  static constexpr int short_dots(int bits) { return bits == 4 ? 8 : bits == 5 ? 4 : 2; }
  static Shorts shorts() { return _mm512_setzero_si512(); }
  static Shorts short_dot(Shorts a, Bytes w, Bytes x) {
    return in_turn(_mm512_add_epi16(a, _mm512_maddubs_epi16(w, x)));
  }
  static Wholes add_shorts(Wholes a, Shorts b) {
    return _mm512_add_epi32(a, _mm512_madd_epi16(b, _mm512_set1_epi16(1)));
  }
#endif
  // Stores the nearest whole numbers to 64 numbers times a factor, ties to even, as bytes. Word t of the first eight is
  // made of numbers t, t + 16, t + 8 and t + 24, and word t of the others of those 32 further on. Stores some other
  // bytes where a product is not in 0 .. 255.
  static void store_fours(uint8_t* p, const Vec (&a)[4], Vec factor) {
    for (int half = 0; half < 2; ++half) {
      const auto whole = [&](int i) {
        return _mm512_castps_si512(_mm512_fmadd_ps(a[2 * half + i], factor, _mm512_set1_ps(rounding_bias)));
      };
      const __m512i pairs =
          _mm512_or_si512(_mm512_and_si512(whole(0), _mm512_set1_epi32(255)), _mm512_slli_epi32(whole(1), 8));
      const __m256i words = _mm512_cvtepi32_epi16(pairs);
      const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 32 * half), _mm_unpacklo_epi16(low, high));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 32 * half + 16), _mm_unpackhi_epi16(low, high));
    }
  }
  // Returns 16 int8 values.
  static Vec widen(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }

  // Inlined early, because GCC otherwise takes the function for one without effect and drops the calls.
  __attribute__((always_inline)) static void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }

 private:
  // Returns a. It keeps GCC from another order of sums, see vec_avx2.h.
  static __m512i in_turn(__m512i a) {
    asm("" : "+v"(a));
    return a;
  }
};

}  // namespace
}  // namespace tokenswift
