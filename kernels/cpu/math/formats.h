// The blocks that weights lie in along k. They are types of GGUF and have its names, but for q8 (Q8_0) and q4 (Q4_1).
//
//   type    weights of a block   w[k]                                        bits a weight: stored, packed
//   q8      32                   d (q - 128)                                 8.5
//   q4      32                   d q + m                                     5
//   q4_0    32                   d (q - 8)                                   4.5
//   q5_0    32                   d (q - 16)                                  5.5
//   q5_1    32                   d q + m                                     6
//   q4_k    256                  (d s) q - dmin t, s and t for each 32       4.5, 4.625
//   q5_k    256                  (d s) q - dmin t, s and t for each 32       5.5, 5.625
//   q6_k    256                  (d s) (q - 32), s for each 16               6.5625
//   iq4_nl  32                   d (codebook[q] - 128)                       4.5
//   iq4_xs  256                  (d s) (codebook[q] - 128), s for each 32    4.25, 4.3125
//
// d, m and dmin are fp16. s and t are whole numbers of at most 8 bits, so that d s and dmin t are exact in fp32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa/kernels.h"

namespace tokenswift {

constexpr int block_size = 32;  // weights that meet one block of activations, and share a scale in most formats

struct BlockFormat {
  const char* name;
  int weights;       // weights of a stored block, a multiple of 32
  int stored_bytes;  // bytes of a stored block
  int bits;          // bits of a quant
  int zero;          // the quant that stands for 0
  bool minimum;      // whether there are m, or dmin and t
  int scales;        // number of s that 32 weights have
  bool codebook;     // whether quants are looked up in iq4_codebook

  constexpr int blocks() const { return weights / block_size; }
  constexpr int halves() const { return minimum ? 2 : 1; }
  constexpr int scale_bytes() const { return scales > 0 ? scales + (minimum ? 1 : 0) : 0; }  // of 32 weights
  // Bytes of a packed column: its halves, then for each 32 weights s and t as bytes and quants in words of four bytes.
  constexpr int packed_bytes() const { return 2 * halves() + blocks() * (scale_bytes() + 4 * bits); }
};

// Returns the format of an element in blocks.
constexpr BlockFormat format_of(Element e) {
  switch (e) {
    case Element::q4:
      return {"q4", 32, 20, 4, 0, true, 0, false};
    case Element::q4_0:
      return {"q4_0", 32, 18, 4, 8, false, 0, false};
    case Element::q5_0:
      return {"q5_0", 32, 22, 5, 16, false, 0, false};
    case Element::q5_1:
      return {"q5_1", 32, 24, 5, 0, true, 0, false};
    case Element::q4_k:
      return {"q4_k", 256, 144, 4, 0, true, 1, false};
    case Element::q5_k:
      return {"q5_k", 256, 176, 5, 0, true, 1, false};
    case Element::q6_k:
      return {"q6_k", 256, 210, 6, 32, false, 2, false};
    case Element::iq4_nl:
      return {"iq4_nl", 32, 18, 4, 128, false, 0, true};
    case Element::iq4_xs:
      return {"iq4_xs", 256, 136, 4, 128, false, 1, true};
    default:
      return {"q8", 32, 34, 8, 128, false, 0, false};
  }
}

// A block of a packed panel is d [columns] and, in formats with a minimum, m [columns] or -dmin [columns]. For each 32
// weights there follow s [scales][columns], in formats with a minimum t [columns], and the quants in words of four k,
// [bits][columns][4]:
//   8 bits      word g has k = 4 g .. 4 g + 3
//   4, 5, 6     word g < 4 has the low four bits of k = 4 g .. 4 g + 3 in the lower halves of its bytes, and those of
//               k = 16 + 4 g .. 19 + 4 g in the upper halves. The words after these four have the upper bits: those of
//               k = 4 g .. 4 g + 3 are in word high_word(bits, g), from bit high_shift(bits, g) of each byte on.
constexpr int high_word(int bits, int g) { return 4 + g * (bits - 4) / 8; }
constexpr int high_shift(int bits, int g) { return g * (bits - 4) % 8; }

// The values of IQ4_NL and IQ4_XS, plus 128.
constexpr uint8_t iq4_codebook[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

}  // namespace tokenswift
