#include "matrix.h"

#include <cstring>

#include "bf16.h"

namespace tokenswift {

// A step of one row is four bytes in either type: two bf16 or one fp32.
constexpr size_t cell_bytes = 4;

Matrix::Matrix(Element element, int panel, int rows, int columns)
    : element_(element), panel_(panel), rows_(rows), columns_(columns) {
  steps_ = (columns + step_of(element) - 1) / step_of(element);
  data_ = Mapping(panels() * panel_bytes());
}

char* Matrix::cell(int row, int step) const {
  return data_.data() + (row / panel_) * panel_bytes() + (size_t(step) * panel_ + row % panel_) * cell_bytes;
}

void Matrix::pack_row(const char* source, int row) {
  const int whole = columns_ / step_of(element_);
  for (int step = 0; step < whole; ++step) std::memcpy(cell(row, step), source + step * cell_bytes, cell_bytes);
  if (whole < steps_) std::memcpy(cell(row, whole), source + whole * cell_bytes, bytes_of(element_));
}

void Matrix::unpack_row(int row, float* out) const {
  for (int step = 0; step < steps_; ++step) {
    if (element_ == Element::f32) {
      std::memcpy(out + step, cell(row, step), cell_bytes);
    } else {
      uint16_t pair[2];
      std::memcpy(pair, cell(row, step), cell_bytes);
      out[2 * step] = to_float(pair[0]);
      if (2 * step + 1 < columns_) out[2 * step + 1] = to_float(pair[1]);
    }
  }
}

}  // namespace tokenswift
