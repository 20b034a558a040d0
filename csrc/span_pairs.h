// The two forms of the span-pair error of one row; mta_fast/reference.py, part 4.
#pragma once

#include "common.h"

namespace mta_fast {

// The pooled spans [N] of all rows: student and teacher, what their lengths are divided by, and their weights.
template <typename T>
struct SpanPairs {
  const Matrix& student;
  const Matrix& teacher;
  const T* student_scale;  // [N] 1 / norm, 0 for a zero vector
  const T* teacher_scale;
  const T* weight;
  T* gradient;  // [N, d_S] of the rows' numerators; nullptr: not wanted
};

// The spans [first, last) of one row.
struct SpanRow {
  int64_t first, last;
  int64_t size() const { return last - first; }
};

// pull becomes factor times its part orthogonal to the unit vector unit * state [d]: the derivative of a normalisation.
template <typename T>
void tangent(const T* state, T unit, T factor, int64_t d, T* pull);

// The numerator of a row in the centred Gram form: linear in its spans.
template <typename T>
T gram_row(const SpanPairs<T>& pairs, const SpanRow& row);

}  // namespace mta_fast
