// The tile registers of AMX (Intel Sapphire Rapids and later): eight matrices of 16 rows of 64 bytes.
//
// A product adds a [16][K] matrix times a [K][16] one to 16 x 16 sums of four bytes. Tile b holds four bytes of k side
// by side, as panels of weights and pages do: row r has k = 4 r .. 4 r + 3 (bytes), or 2 r and 2 r + 1 (bf16), of all
// 16 columns. All tiles have all rows and columns here, always. Then a row costs what sixteen cost, and has the same
// bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokenswift {
namespace {

struct Tiles {
  // Makes this thread's tile registers ready. Each function that computes with tiles calls it first.
  static void use() {
    if (ready) return;
    alignas(64) static constexpr Configuration all;
    asm volatile("ldtilecfg %0" ::"m"(all));
    ready = true;
  }
  // Gives the registers back, so that the system need not save them for this thread, and whoever else computes with
  // tiles on it is not met by ours.
  static void rest() {
    if (!ready) return;
    asm volatile("tilerelease");
    ready = false;
  }

  template <int t>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(t));
  }
  // Rows are `stride` bytes apart. Loads are three times as fast where rows begin at multiples of 64 bytes.
  template <int t>
  static void load(const void* p, size_t stride) {
    asm volatile("tileloadd (%0,%1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  static void store(void* p, size_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1)" ::"r"(p), "r"(stride), "i"(t) : "memory");
  }

  // c += a b, with both factors bf16 and sums fp32. For each 32 k, the products of even k are summed apart from those
  // of odd k, from zero on, by fused multiply-adds in the order of k. Then even + odd, and then that is added to c.
  // Each step rounds to nearest even and flushes denormal operands and results to zero.
  template <int c, int a, int b>
  static void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
  // c += a b, with bytes and sums of 32 bits, which wrap.
  template <int c, int a, int b>
  static void dot_signed_unsigned() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
  template <int c, int a, int b>
  static void dot_unsigned_signed() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }

 private:
  struct Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static inline thread_local bool ready = false;
};

}  // namespace
}  // namespace tokenswift
