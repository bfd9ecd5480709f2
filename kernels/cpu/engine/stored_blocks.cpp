#include "engine/stored_blocks.h"

#include <cstring>

#include "math/half.h"

namespace tokenswift {
namespace {

constexpr int half_block = block_size / 2;

uint16_t read_half(const uint8_t* at) {
  uint16_t half;
  std::memcpy(&half, at, sizeof half);
  return half;
}

// Reads the low four bits of 2 * count quants. Byte i has those of k = i and k = count + i.
void read_nibbles(const uint8_t* bytes, int count, uint8_t* quants) {
  for (int i = 0; i < count; ++i) {
    quants[i] = bytes[i] & 15;
    quants[count + i] = bytes[i] >> 4;
  }
}

// Adds the fifth bits of Q5_0 and Q5_1: bit k of a word belongs to quant k.
void add_fifth_bits(const uint8_t* word, uint8_t* quants) {
  for (int k = 0; k < block_size; ++k) quants[k] |= (word[k / 8] >> k % 8 & 1) << 4;
}

// Reads d, dmin and the eight s and t of Q4_K and Q5_K. These have 6 bits each and take 12 bytes. Bytes 0-3 hold the
// first four s in their lower six bits, and bytes 4-7 the first four t. The two bits above these are the upper two of
// the last four s and t. Bytes 8-11 hold the lower four bits of the last four.
void read_scales_and_minima(const uint8_t* stored, PlainBlock* out) {
  const uint8_t *of_s = stored + 4, *of_t = stored + 8, *last = stored + 12;
  out->halves[0] = read_half(stored);
  out->halves[1] = read_half(stored + 2) ^ 0x8000;
  for (int i = 0; i < 4; ++i) {
    out->scales[i][0] = int8_t(of_s[i] & 63);
    out->scales[i][1] = int8_t(of_t[i] & 63);
    out->scales[4 + i][0] = int8_t((last[i] & 15) | of_s[i] >> 6 << 4);
    out->scales[4 + i][1] = int8_t(last[i] >> 4 | of_t[i] >> 6 << 4);
  }
}

void read_q5_k(const uint8_t* stored, PlainBlock* out) {
  const uint8_t *high = stored + 16, *low = stored + 48;
  read_scales_and_minima(stored, out);
  for (int pair = 0; pair < 4; ++pair) read_nibbles(low + 32 * pair, 32, out->quants + 64 * pair);
  for (int k = 0; k < largest_block; ++k) out->quants[k] |= (high[k % 32] >> k / 32 & 1) << 4;
}

// Reads Q6_K, whose quants lie in two halves of 128. A half has 64 bytes of low bits, and 32 bytes of high ones. Byte k
// of the latter has the pairs of bits of k, 32 + k, 64 + k and 96 + k.
void read_q6_k(const uint8_t* stored, PlainBlock* out) {
  const uint8_t *low = stored, *high = stored + 128;
  for (int half = 0; half < 2; ++half) {
    uint8_t* quants = out->quants + 128 * half;
    read_nibbles(low + 64 * half, 64, quants);
    for (int k = 0; k < 128; ++k) quants[k] |= (high[32 * half + k % 32] >> 2 * (k / 32) & 3) << 4;
  }
  std::memcpy(out->scales, stored + 192, 16);
  out->halves[0] = read_half(stored + 208);
}

// Reads IQ4_XS: d, a word of the upper two bits of eight s, four bytes of their lower four bits, and quants. An s is
// stored with 32 added.
void read_iq4_xs(const uint8_t* stored, PlainBlock* out) {
  const int upper = read_half(stored + 2);
  out->halves[0] = read_half(stored);
  for (int i = 0; i < 8; ++i) {
    const int lower = stored[4 + i / 2] >> 4 * (i % 2) & 15;
    out->scales[i][0] = int8_t((lower | (upper >> 2 * i & 3) << 4) - 32);
    read_nibbles(stored + 8 + half_block * i, half_block, out->quants + block_size * i);
  }
}

}  // namespace

void read_stored(Element element, const char* stored, PlainBlock* out) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(stored);
  const BlockFormat format = format_of(element);
  switch (element) {
    case Element::q4_k:
      read_scales_and_minima(bytes, out);
      for (int pair = 0; pair < 4; ++pair) read_nibbles(bytes + 16 + 32 * pair, 32, out->quants + 64 * pair);
      return;
    case Element::q5_k:
      return read_q5_k(bytes, out);
    case Element::q6_k:
      return read_q6_k(bytes, out);
    case Element::iq4_xs:
      return read_iq4_xs(bytes, out);
    default:
      break;
  }
  for (int i = 0; i < format.halves(); ++i, bytes += 2) out->halves[i] = read_half(bytes);
  if (format.bits == 8) {
    for (int k = 0; k < block_size; ++k) out->quants[k] = bytes[k] ^ 128;
    return;
  }
  read_nibbles(bytes + (format.bits == 5 ? 4 : 0), half_block, out->quants);
  if (format.bits == 5) add_fifth_bits(bytes, out->quants);
}

void write_packed(Element element, const PlainBlock& block, char* at, int columns, int column) {
  const BlockFormat format = format_of(element);
  for (int i = 0; i < format.halves(); ++i, at += 2 * columns) std::memcpy(at + 2 * column, block.halves + i, 2);
  for (int part = 0; part < format.blocks(); ++part) {
    for (int i = 0; i < format.scale_bytes(); ++i, at += columns) at[column] = block.scales[part][i];
    const uint8_t* quants = block.quants + part * block_size;
    uint8_t words[8][4] = {};
    for (int g = 0; g < 8; ++g) {
      for (int i = 0; i < 4; ++i) {
        const int quant = quants[4 * g + i];
        if (format.bits == 8) {
          words[g][i] = uint8_t(quant);
          continue;
        }
        words[g % 4][i] |= (quant & 15) << (g < 4 ? 0 : 4);
        if (format.bits > 4) words[high_word(format.bits, g)][i] |= quant >> 4 << high_shift(format.bits, g);
      }
    }
    for (int word = 0; word < format.bits; ++word, at += 4 * columns) std::memcpy(at + 4 * column, words[word], 4);
  }
}

void read_packed(Element element, const char* at, int columns, int column, PlainBlock* out) {
  const BlockFormat format = format_of(element);
  for (int i = 0; i < format.halves(); ++i, at += 2 * columns) std::memcpy(out->halves + i, at + 2 * column, 2);
  for (int part = 0; part < format.blocks(); ++part) {
    for (int i = 0; i < format.scale_bytes(); ++i, at += columns) out->scales[part][i] = int8_t(at[column]);
    uint8_t* quants = out->quants + part * block_size;
    uint8_t words[8][4] = {};
    for (int word = 0; word < format.bits; ++word, at += 4 * columns) std::memcpy(words[word], at + 4 * column, 4);
    for (int k = 0; k < block_size; ++k) {
      const int g = k / 4, i = k % 4;
      quants[k] = words[format.bits == 8 ? g : g % 4][i];
      if (format.bits < 8) quants[k] = quants[k] >> (g < 4 ? 0 : 4) & 15;
      if (format.bits == 5 || format.bits == 6) {
        const int high = words[high_word(format.bits, g)][i] >> high_shift(format.bits, g);
        quants[k] |= (high & ((1 << (format.bits - 4)) - 1)) << 4;
      }
    }
  }
}

void widen_block(Element element, const PlainBlock& block, float* out) {
  const BlockFormat format = format_of(element);
  const float d = half_to_float(block.halves[0]), m = format.minimum ? half_to_float(block.halves[1]) : 0.0f;
  for (int k = 0; k < format.weights; ++k) {
    const int8_t* scales = block.scales[k / block_size];
    const int quant = format.codebook ? iq4_codebook[block.quants[k]] : block.quants[k];
    float scale = d, minimum = m;
    if (format.scales > 0) scale *= float(scales[format.scales == 2 ? k % block_size / half_block : 0]);
    if (format.scales > 0 && format.minimum) minimum *= float(scales[format.scales]);
    out[k] = scale * float(quant - format.zero) + minimum;
  }
}

}  // namespace tokenswift
