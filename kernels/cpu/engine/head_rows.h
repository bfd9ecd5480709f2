// Some rows of an LM head, whose logits alone a draft pass computes.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/matrix.h"

namespace tokenswift {

// The head's first rows, where they lie, and copies of others, which stand together so that no pass reads the rows
// between them. A copied row gives the logit, to the bit, that the head's own gives.
class HeadRows {
 public:
  // room: how many copies there may be. Throws std::invalid_argument for more than the head has rows.
  HeadRows(const Matrix& head, int panel, int room);

  // Takes in rows 0 .. first - 1. Throws std::invalid_argument unless they are whole panels of the head.
  void set_first(int first);
  int first() const { return first_; }
  int first_panels() const { return first_ / panel_; }

  // Puts a copy of a row of the head into a place, instead of what was there. No pass may be reading it. Throws
  // std::invalid_argument for places and rows that there are not, and for a row that has a place already.
  void put(int place, int row);

  // The row whose copy stands there, -1 where none does.
  int row_at(int place) const { return place < used_ ? rows_[place] : -1; }
  int copied_panels() const { return (used_ + panel_ - 1) / panel_; }
  const Matrix& copies() const { return copies_; }

  // Whether they are rows of this head, and it has the type that it had.
  bool are_of(const Matrix& head) const { return &head == &head_ && head.element() == copies_.element(); }

 private:
  const Matrix& head_;
  int panel_, first_ = 0;
  int used_ = 0;  // places up to the last one that was filled
  std::vector<int32_t> rows_;
  Matrix copies_;
};

}  // namespace tokenswift
