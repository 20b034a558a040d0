#include "gemm.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "common.h"
#include "vector.h"

namespace mta_fast {

namespace {

// A tensor over memory that somebody else owns.
class Borrowed {
 public:
  template <typename T>
  Borrowed(const T* values, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
    int64_t sizes[] = {rows, cols}, strides[] = {row_stride, col_stride};
    int32_t dtype = std::is_same_v<T, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(const_cast<T*>(values), 2, sizes, strides, 0,
                                                                     dtype, aoti_torch_device_type_cpu(), 0, &handle_));
  }
  template <typename T>
  explicit Borrowed(const View<T>& v) : Borrowed(v.data, v.rows, v.cols, v.row_stride, v.col_stride) {}
  ~Borrowed() { aoti_torch_delete_tensor_object(handle_); }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  AtenTensorHandle get() const { return handle_; }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// A product on the calling thread alone would take several threads: its result could depend on their number.
void check_parallel() {
  MTA_CHECK(in_parallel_tasks, "gemm", "a call from within run_tasks, whose `work` covers every product", "none");
}

// c += scale a b by our own loops, for products that are over before the vendor GEMM has begun.
template <typename T>
void small_gemm_add(const View<T>& a, const View<T>& b, T scale, T* c, int64_t ld) {
  for (int64_t i = 0; i < a.rows; ++i) {
    const T* row = a.data + i * a.row_stride;
    if (a.col_stride == 1 && b.row_stride == 1) {
      for (int64_t j = 0; j < b.cols; ++j) c[i * ld + j] += scale * dot(row, b.data + j * b.col_stride, a.cols);
    } else {
      for (int64_t k = 0; k < a.cols; ++k) {
        const T factor = scale * row[k * a.col_stride];
        if (b.col_stride == 1) {
          add_scaled(c + i * ld, b.data + k * b.row_stride, factor, b.cols);
        } else {
          for (int64_t j = 0; j < b.cols; ++j) c[i * ld + j] += factor * b.data[k * b.row_stride + j * b.col_stride];
        }
      }
    }
  }
}

template <typename T>
bool is_small(const View<T>& a, const View<T>& b) {
  return a.rows * b.cols * a.cols < kSmallWork;
}

}  // namespace

template <typename T>
void gemm(const View<T>& a, const View<T>& b, T* c, int64_t ld) {
  if (is_small(a, b)) {
    for (int64_t i = 0; i < a.rows; ++i) std::fill(c + i * ld, c + i * ld + b.cols, T(0));
    small_gemm_add(a, b, T(1), c, ld);
    return;
  }
  check_parallel();
  Borrowed left(a), right(b), out(c, a.rows, b.cols, ld, 1);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
}

template <typename T>
void gemm_add(const View<T>& a, const View<T>& b, T scale, T* c, int64_t ld) {
  if (is_small(a, b)) return small_gemm_add(a, b, scale, c, ld);
  check_parallel();
  Borrowed left(a), right(b), out(c, a.rows, b.cols, ld, 1);
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), 1.0, static_cast<double>(scale)));
}

template void gemm<float>(const View<float>&, const View<float>&, float*, int64_t);
template void gemm<double>(const View<double>&, const View<double>&, double*, int64_t);
template void gemm_add<float>(const View<float>&, const View<float>&, float, float*, int64_t);
template void gemm_add<double>(const View<double>&, const View<double>&, double, double*, int64_t);

}  // namespace mta_fast
