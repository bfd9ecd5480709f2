// A weight matrix packed once for the kernels: [rows / panel][columns / step][panel][step].
#pragma once

#include "kernels.h"
#include "memory.h"
#include "team.h"

namespace tokenswift {

// rows are output features, columns input features (Hugging Face's [out, in]). Padding is zero.
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

  // Packs `count` rows of [count, columns] values; row i becomes row place(i). The element type is the matrix's own.
  template <class Place>
  void pack(Team& team, const void* source, int count, const Place& place) {
    constexpr int block = 64;
    team.run((count + block - 1) / block, [&](int piece, int) {
      for (int i = piece * block; i < count && i < (piece + 1) * block; ++i) {
        pack_row(static_cast<const char*>(source) + size_t(i) * columns_ * bytes_of(element_), place(i));
      }
    });
  }

  // Row `row` as fp32, what an embedding look-up reads. out: [columns]
  void unpack_row(int row, float* out) const;

 private:
  size_t panel_bytes() const { return size_t(steps_) * panel_ * step_of(element_) * bytes_of(element_); }
  char* cell(int row, int step) const;
  void pack_row(const char* source, int row);

  Element element_ = Element::bf16;
  int panel_ = 1, rows_ = 0, columns_ = 0, steps_ = 0;
  Mapping data_;
};

}  // namespace tokenswift
