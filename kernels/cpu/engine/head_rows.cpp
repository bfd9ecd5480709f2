#include "engine/head_rows.h"

#include <algorithm>
#include <limits>

#include "engine/decoder.h"
#include "engine/require.h"

namespace tokenswift {

HeadRows::HeadRows(const Matrix& head, int panel, int room) : head_(head), panel_(panel) {
  require(room > 0 && room <= head.rows(), "room for ", room, " rows of a head of ", head.rows());
  rows_.assign(room, -1);
  copies_ = Matrix(head.element(), panel, room, head.columns());
}

void HeadRows::set_first(int first) {
  require(first >= 0 && first <= head_.rows() && first % panel_ == 0, "the first rows of a head of ", head_.rows(),
          " are whole panels of ", panel_, ", not ", first);
  first_ = first;
}

void HeadRows::put(int place, int row) {
  require(place >= 0 && place < int(rows_.size()), "place ", place, " of ", rows_.size());
  require(row >= 0 && row < head_.rows(), "row ", row, " of ", head_.rows());
  // Two threads would write one logit.
  require(std::find(rows_.begin(), rows_.end(), row) == rows_.end(), "row ", row, " has a place already");
  require(are_of(head_), "the head was set anew");
  copies_.copy_row(head_, row, place);
  rows_[place] = row;
  used_ = std::max(used_, place + 1);
}

std::unique_ptr<HeadRows> Decoder::head_rows(int room) const {
  return std::make_unique<HeadRows>(head_.weight, kernels_.panel, room);
}

// Computes the operands times the chosen rows of the head. The other logits are minus infinity.
void Decoder::project_chosen(const HeadRows& chosen, int rows, float* logits) {
  const int width = kernels_.panel, first_panels = chosen.first_panels();
  std::fill_n(logits, size_t(rows) * shape_.vocab, -std::numeric_limits<float>::infinity());
  share(rows, first_panels + chosen.copied_panels(), [&](int panel, int first, int count, float* products) {
    const bool copied = panel >= first_panels;
    if (copied) panel -= first_panels;
    const Matrix& weight = copied ? chosen.copies() : head_.weight;
    kernels_.of(weight.element())
        .multiply(weight.panel_data(panel), weight.steps(), operands(first), operand_stride_, count, products, width);
    if (shape_.logit_cap > 0) kernels_.soft_cap(products, count * width, float(shape_.logit_cap));
    for (int row = 0; row < count; ++row, products += width) {
      float* of_row = logits + size_t(first + row) * shape_.vocab;
      if (!copied) {
        std::copy_n(products, width, of_row + panel * width);
        continue;
      }
      for (int column = 0; column < width; ++column) {
        const int token = chosen.row_at(panel * width + column);
        if (token >= chosen.first()) of_row[token] = products[column];
      }
    }
  });
}

}  // namespace tokenswift
