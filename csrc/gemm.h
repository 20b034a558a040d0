// Products of tiles through the vendor GEMM that torch links.
#pragma once

#include <cstdint>

namespace mta_fast {

// Values of a matrix [rows, cols]; one of the strides is 1.
template <typename T>
struct View {
  const T* data;
  int64_t rows, cols, row_stride, col_stride;

  View(const T* data, int64_t rows, int64_t cols, int64_t row_stride)
      : data(data), rows(rows), cols(cols), row_stride(row_stride), col_stride(1) {}
  View transposed() const { return View(data, cols, rows, col_stride, row_stride); }

 private:
  View(const T* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride)
      : data(data), rows(rows), cols(cols), row_stride(row_stride), col_stride(col_stride) {}
};

// c [a.rows, b.cols], rows `ld` apart: c = a b, and c += scale a b.
template <typename T>
void gemm(const View<T>& a, const View<T>& b, T* c, int64_t ld);
template <typename T>
void gemm_add(const View<T>& a, const View<T>& b, T scale, T* c, int64_t ld);

}  // namespace mta_fast
