#include "engine/matrix.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "engine/require.h"
#include "engine/stored_blocks.h"
#include "math/bf16.h"
#include "math/quant.h"

namespace tokenswift {
namespace {

// The bytes of one row's step in either type of values: two bf16 or one fp32.
constexpr size_t cell_bytes = 4;

size_t bytes_of_step(Element e, int panel) {
  return panel * (in_blocks(e) ? size_t(format_of(e).packed_bytes()) : cell_bytes);
}

int columns_of_step(Element e) { return in_blocks(e) ? format_of(e).weights : step_of(e); }

// Reads the 32 values from column `first` on. Writes zeros for those after the row's last column.
void read_block(const MatrixSource& source, const char* row, int first, float* w) {
  const int count = std::min(block_size, source.columns - first);
  std::fill(w + count, w + block_size, 0.0f);
  if (source.element == Element::f32) {
    std::memcpy(w, row + first * sizeof *w, count * sizeof *w);
    return;
  }
  uint16_t halves[block_size];
  std::memcpy(halves, row + first * sizeof *halves, count * sizeof *halves);
  std::transform(halves, halves + count, w, to_float);
}

constexpr int piece_rows = 64;
constexpr double four_bits_error = 0.01;  // relative, root mean square; 8 bits cost normally distributed values 0.006

}  // namespace

bool four_bits_suffice(Team& team, const MatrixSource& source) {
  if (in_blocks(source.element)) return false;
  std::atomic<bool> suffice{true};
  team.run((source.rows + piece_rows - 1) / piece_rows, [&](int piece, int) {
    double error = 0, size = 0;
    for (int row = piece * piece_rows; suffice && row < std::min(source.rows, (piece + 1) * piece_rows); ++row) {
      const char* values = static_cast<const char*>(source.data) + row * source.row_bytes();
      for (int first = 0; first < source.columns; first += block_size) {
        float w[block_size], found[block_size];
        char block[format_of(Element::q4).stored_bytes];
        read_block(source, values, first, w);
        quantise_to_four_bits(w, block);
        widen_four_bits(block, found);
        for (int i = 0; i < block_size; ++i) {
          error += double(found[i] - w[i]) * (found[i] - w[i]);
          size += double(w[i]) * w[i];
        }
      }
    }
    if (!(error <= four_bits_error * four_bits_error * size)) suffice = false;
  });
  return suffice;
}

size_t MatrixSource::row_bytes() const {
  if (in_blocks(element)) return size_t(columns / format_of(element).weights) * format_of(element).stored_bytes;
  return columns * bytes_of(element);
}

Matrix::Matrix(Element element, int panel, int rows, int columns)
    : element_(element), panel_(panel), rows_(rows), columns_(columns), step_bytes_(bytes_of_step(element, panel)) {
  const int step = columns_of_step(element);
  steps_ = (columns + step - 1) / step;
  data_ = Mapping(panels() * panel_bytes());
}

void Matrix::pack(Team& team, const MatrixSource& source) {
  const bool same = source.element == element_;
  const bool rounded = (element_ == Element::q8 || element_ == Element::q4) && !in_blocks(source.element);
  require(same || rounded, "values of a type that this matrix cannot hold");
  const bool whole = !in_blocks(source.element) || columns_ % columns_of_step(element_) == 0;
  require(source.rows == rows_ && source.columns == columns_ && whole, "[", source.rows, ", ", source.columns,
          "] values for a matrix of [", rows_, ", ", columns_, "]");
  team.run((rows_ + piece_rows - 1) / piece_rows, [&](int piece, int) {
    for (int row = piece * piece_rows; row < std::min(rows_, (piece + 1) * piece_rows); ++row) {
      const char* values = static_cast<const char*>(source.data) + row * source.row_bytes();
      if (rounded) quantise(source, values, row);
      else if (in_blocks(element_)) pack_blocks(values, row);
      else pack_values(values, row);
    }
  });
}

char* Matrix::step_at(int row, int step) const {
  return data_.data() + (row / panel_) * panel_bytes() + step * step_bytes_;
}

void Matrix::pack_values(const char* source, int row) {
  const int whole = columns_ / step_of(element_);
  const size_t lane = row % panel_ * cell_bytes;
  for (int step = 0; step < whole; ++step) {
    std::memcpy(step_at(row, step) + lane, source + step * cell_bytes, cell_bytes);
  }
  if (whole < steps_) {
    std::memcpy(step_at(row, whole) + lane, source + whole * cell_bytes, bytes_of(element_));
  }
}

void Matrix::pack_blocks(const char* source, int row) {
  PlainBlock block;
  for (int step = 0; step < steps_; ++step, source += format_of(element_).stored_bytes) {
    read_stored(element_, source, &block);
    write_packed(element_, block, step_at(row, step), panel_, row % panel_);
  }
}

void Matrix::quantise(const MatrixSource& source, const char* values, int row) {
  thread_local Buffer<char> blocks;
  const bool q4 = element_ == Element::q4;
  const size_t bytes = format_of(element_).stored_bytes;
  blocks.reserve(steps_ * bytes);
  for (int step = 0; step < steps_; ++step) {
    float w[block_size];
    read_block(source, values, step * block_size, w);
    (q4 ? quantise_to_four_bits : quantise_weights)(w, blocks.data() + step * bytes);
  }
  pack_blocks(blocks.data(), row);
}

void Matrix::copy_row(const Matrix& source, int from, int to) {
  const bool alike = source.element_ == element_ && source.panel_ == panel_ && source.columns_ == columns_;
  require(alike && from >= 0 && from < source.rows_ && to >= 0 && to < rows_, "a row of another matrix than this one");
  for (int step = 0; step < steps_; ++step) {
    const char* at = source.step_at(from, step);
    if (in_blocks(element_)) {
      PlainBlock block;
      read_packed(element_, at, panel_, from % panel_, &block);
      write_packed(element_, block, step_at(to, step), panel_, to % panel_);
    } else {
      std::memcpy(step_at(to, step) + to % panel_ * cell_bytes, at + from % panel_ * cell_bytes, cell_bytes);
    }
  }
}

void Matrix::unpack_row(int row, float* out) const {
  const int lane = row % panel_;
  for (int step = 0; step < steps_; ++step) {
    const char* at = step_at(row, step);
    if (element_ == Element::f32) {
      std::memcpy(out + step, at + lane * cell_bytes, cell_bytes);
    } else if (element_ == Element::bf16) {
      uint16_t pair[2];
      std::memcpy(pair, at + lane * cell_bytes, cell_bytes);
      out[2 * step] = to_float(pair[0]);
      if (2 * step + 1 < columns_) out[2 * step + 1] = to_float(pair[1]);
    } else {
      PlainBlock block;
      read_packed(element_, at, panel_, lane, &block);
      widen_block(element_, block, out + step * format_of(element_).weights);
    }
  }
}

}  // namespace tokenswift
