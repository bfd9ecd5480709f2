// A weight matrix packed once for the kernels: [rows / panel][columns / step][panel][step], or in blocks (formats.h).
#pragma once

#include "isa/kernels.h"
#include "engine/memory.h"
#include "engine/team.h"

namespace tokenswift {

// A matrix as it comes in, row after row. It has values, or blocks as GGUF stores them.
struct MatrixSource {
  Element element;
  const void* data;
  int rows, columns;  // in blocks, a row is whole blocks

  size_t row_bytes() const;
};

// A packed matrix. Rows are output features and columns input features (Hugging Face's [out, in]). Padding is zero.
class Matrix {
 public:
  Matrix() = default;
  Matrix(Element element, int panel, int rows, int columns);

  Element element() const { return element_; }
  int rows() const { return rows_; }
  int columns() const { return columns_; }
  int panels() const { return (rows_ + panel_ - 1) / panel_; }
  int steps() const { return steps_; }
  size_t bytes() const { return data_ ? panels() * panel_bytes() : 0; }
  const char* panel_data(int panel) const { return data_.data() + panel * panel_bytes(); }
  explicit operator bool() const { return bool(data_); }

  // Packs all rows. A matrix of q8 or q4 rounds values to its blocks. Throws std::invalid_argument for other sizes and
  // types.
  void pack(Team& team, const MatrixSource& source);

  // Copies a row of a matrix of the same type, panels and columns, bit by bit. Throws std::invalid_argument for others.
  void copy_row(const Matrix& source, int from, int to);

  // Reads a row as fp32, for an embedding look-up. out: [columns], with room up to a whole block.
  void unpack_row(int row, float* out) const;

 private:
  size_t panel_bytes() const { return size_t(steps_) * step_bytes_; }
  char* step_at(int row, int step) const;
  void pack_values(const char* source, int row);
  void pack_blocks(const char* source, int row);
  void quantise(const MatrixSource& source, const char* values, int row);

  Element element_ = Element::bf16;
  int panel_ = 1, rows_ = 0, columns_ = 0, steps_ = 0;
  size_t step_bytes_ = 0;  // bytes of one step of a panel
  Mapping data_;
};

// Returns whether 4 bits hold these values almost as well as 8. They do where the values came from blocks of 4 bits.
bool four_bits_suffice(Team& team, const MatrixSource& source);

}  // namespace tokenswift
