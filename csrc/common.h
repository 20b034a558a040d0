// What the four ops share: checks, strided matrices of any floating dtype, scratch memory, tasks.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace mta_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// --- checks: everything is looked at before a pointer is touched ---

#define MTA_CHECK(condition, name, expected, ...) \
  STD_TORCH_CHECK(condition, name, ": expected ", expected, ", got ", __VA_ARGS__)

const char* dtype_name(ScalarType dtype);
bool is_float(ScalarType dtype);  // float64, float32, bfloat16 or float16

void check_cpu(const char* name, const Tensor& tensor);
// A floating-point tensor of `dim` dimensions on the CPU.
void check_float(const char* name, const Tensor& tensor, int64_t dim);
void check_size(const char* name, const char* what, int64_t expected, int64_t got);

// A contiguous int32 index tensor on the CPU.
class Index {
 public:
  Index(const char* name, const Tensor& tensor, int64_t dim);
  int32_t operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return size_; }  // along the first dimension
  // Every value is in [0, bound).
  void check_below(int64_t bound) const;
  // Splits [n + 1]: 0 first, never decreasing, `total` last.
  void check_splits(int64_t total) const;

 private:
  const char* name_;
  Tensor owner_;
  const int32_t* data_;
  int64_t size_, count_;
};

// --- matrices as they come ---

// A tensor [rows, cols] (or [rows], one column) with any row stride; the last dimension is made contiguous.
struct Matrix {
  Matrix(const char* name, const Tensor& tensor, int64_t dim = 2);

  Tensor owner;
  ScalarType dtype;
  int64_t rows, cols, stride;

  // Row `row` in the compute dtype: the tensor's own memory where the dtype is the same, else `scratch`.
  template <typename T>
  const T* row(int64_t row, T* scratch) const;
  // The same of `count` consecutive rows; `ld` becomes the distance between them.
  template <typename T>
  const T* block(int64_t first, int64_t count, T* scratch, int64_t& ld) const;
  // Rows[i] for i in [0, count) one after the other into `out` [count, cols].
  template <typename T>
  void gather(const int32_t* which, int64_t count, T* out) const;

  template <typename T>
  bool is() const {
    return dtype == (std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float);
  }

 private:
  const void* data_;
  template <typename T>
  void convert(int64_t row, T* out) const;
};

// `count` values in the compute dtype to `out` in its own dtype.
template <typename T>
void store(const T* values, int64_t count, ScalarType dtype, void* out);

ScalarType compute_dtype(std::initializer_list<ScalarType> dtypes);  // float64 if any is, else float32

// `Body` of float or double, by the compute dtype: MTA_DISPATCH(dtype, { ... T ... }).
#define MTA_DISPATCH(dtype, ...)            \
  [&] {                                     \
    if ((dtype) == ScalarType::Double) {    \
      using T = double;                     \
      return __VA_ARGS__();                 \
    }                                       \
    using T = float;                        \
    return __VA_ARGS__();                   \
  }()

Tensor make_empty(std::initializer_list<int64_t> sizes, ScalarType dtype);

template <typename T>
T* data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
constexpr ScalarType dtype_of = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// --- scratch memory ---

// Uninitialised values, aligned to a cache line. Grows, never shrinks.
template <typename T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t size) { get(size); }
  T* get(int64_t size) {
    if (size > size_) {
      size_t bytes = (static_cast<size_t>(size) * sizeof(T) + kLine - 1) / kLine * kLine;
      memory_.reset(static_cast<T*>(std::aligned_alloc(kLine, bytes)));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = size;
    }
    return memory_.get();
  }
  T* get() const { return memory_.get(); }

 private:
  static constexpr size_t kLine = 64;
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t size_ = 0;
};

// --- tasks ---

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads that run_tasks uses at most.
int64_t num_threads();

// run(task, thread) for every task in [0, count), each by whichever thread is free, first tasks first. What a task
// writes must not depend on its thread: then neither does the result. Inside, the vendor GEMM is single-threaded.
template <typename Run>
void run_tasks(int64_t count, const Run& run) {
  if (count <= 0) return;
  std::atomic<int64_t> next{0};
  auto worker = [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      for (int64_t task = next++; task < count; task = next++) run(task, thread);
    }
  };
  // one more than the tasks need, so that one task alone is inside a parallel region too: the vendor GEMM then
  // takes one thread, and its result does not depend on how many there are
  torch::stable::parallel_for(0, std::max<int64_t>(std::min(num_threads(), count), 2), 1, worker);
}

}  // namespace mta_fast
