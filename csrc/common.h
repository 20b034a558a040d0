// What the ops share: checks, strided matrices of any floating dtype, scratch memory, tasks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace mta_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// --- checks: everything is looked at before a pointer is touched ---

#define MTA_CHECK(condition, name, expected, ...)                      \
  do {                                                                 \
    if (!(condition)) ::mta_fast::refuse(name, expected, __VA_ARGS__); \
  } while (false)

template <typename Expected, typename... Got>
[[noreturn]] void refuse(const char* name, const Expected& expected, const Got&... got) {
  std::ostringstream message;
  message << name << ": expected " << expected << ", got ";
  (message << ... << got);
  throw std::runtime_error(message.str());
}

constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();  // indices are int32

const char* dtype_name(ScalarType dtype);
bool is_float(ScalarType dtype);  // float64, float32, bfloat16 or float16
void check_floating(const char* name, ScalarType dtype);
ScalarType dtype_of_tensor(const Tensor& tensor);  // Undefined where the stable interface knows none for it

// A dense tensor on the CPU.
void check_cpu(const char* name, const Tensor& tensor);
// tensor.contiguous(), refused where the copy doesn't fit in memory.
Tensor make_contiguous(const char* name, const Tensor& tensor);
// A floating-point tensor of `dim` dimensions on the CPU.
void check_float(const char* name, const Tensor& tensor, int64_t dim);
void check_size(const char* name, const char* what, int64_t expected, int64_t got);

// A contiguous int32 index tensor on the CPU.
class Index {
 public:
  Index(const char* name, const Tensor& tensor, int64_t dim);
  int32_t operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return size_; }  // along the first dimension
  // Every value is greater than the one before.
  void check_ascending() const;
  // Every value is in [0, bound).
  void check_below(int64_t bound) const;
  // The same, and no value comes twice.
  void check_distinct(int64_t bound) const;
  // [n, columns]
  void check_columns(int64_t columns) const;
  // Ranges [n, 2]: 0 <= start <= end <= bound.
  void check_ranges(int64_t bound) const;
  // 0 first, never decreasing.
  void check_bounds() const;
  // Splits [n + 1]: 0 first, never decreasing, `total` last.
  void check_splits(int64_t total) const;

 private:
  const char* name_;
  Tensor owner_;
  const int32_t* data_;
  int64_t size_ = 0, count_ = 0, columns_ = 1;
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

// to = scale * from [count], `to` in `dtype`; `scratch` [count] is used where that is not the compute dtype.
template <typename T>
void scale_into(const T* from, T scale, int64_t count, ScalarType dtype, T* scratch, void* to);

// Whether a product in this dtype reads rounded factors, and the rounding, in place.
inline bool narrows(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }
template <typename T>
void round_to(ScalarType dtype, T* values, int64_t count);

ScalarType compute_dtype(std::initializer_list<ScalarType> dtypes);  // float64 if any is, else float32

// function(T()) with T the compute dtype.
template <typename Function>
auto dispatch(ScalarType dtype, const Function& function) {
  return dtype == ScalarType::Double ? function(double()) : function(float());
}

// Memory that is about to be written whole: in large pages where the system offers them, as a page fault for every
// 4 KB costs more than writing them.
void use_large_pages(void* memory, size_t bytes);

// `names`: the arguments that its size comes from.
Tensor make_empty(const char* names, std::initializer_list<int64_t> sizes, ScalarType dtype);

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

// Rows of a matrix whose lengths are known: the matrix' own memory and the factors that bring each row to scale, or,
// where it is of another dtype or the factors could overflow a product, scaled copies and no factors.
template <typename T>
struct ScaledRows {
  const T* values;
  int64_t stride;
  const T* scale;  // nullptr: the values are scaled already

  T factor(int64_t row) const { return scale == nullptr ? T(1) : scale[row]; }
};

// Whether products of the rows can be taken before they are scaled.
template <typename T>
bool scales_later(const Matrix& matrix, const T* scale, int64_t count);

// Rows [first, first + count), `scale` [count] their factors; `copies` [count, cols] is used unless `later`.
template <typename T>
ScaledRows<T> scaled_rows(const Matrix& matrix, int64_t first, int64_t count, const T* scale, bool later, T* copies);

// A vector of any floating dtype, one value at a time.
template <typename T>
class Values {
 public:
  Values(const char* name, const Tensor& tensor) : matrix_(name, tensor, 1) {}
  T operator[](int64_t i) const {
    T scratch;
    return *matrix_.row<T>(i, &scratch);
  }
  int64_t size() const { return matrix_.rows; }

 private:
  Matrix matrix_;
};

// --- scratch memory ---

// Uninitialised values, aligned to a cache line. Grows, never shrinks.
template <typename T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t size) { get(size); }
  T* get(int64_t size) {
    if (size > size_) {
      constexpr int64_t kMost = (std::numeric_limits<int64_t>::max() - kLine) / sizeof(T);
      size_t bytes = (static_cast<size_t>(size) * sizeof(T) + kLine - 1) / kLine * kLine;
      size_ = 0;
      memory_.reset();  // first, so that both are never held
      if (size <= kMost) memory_.reset(static_cast<T*>(std::aligned_alloc(kLine, bytes)));
      MTA_CHECK(memory_ != nullptr, "scratch memory",
                std::to_string(size) + " values of " + std::to_string(sizeof(T)) + " bytes",
                "none of the system; give fewer tokens or spans at once");
      use_large_pages(memory_.get(), bytes);
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

// Below this many multiply-adds an op stays on the calling thread, and a product of tiles is taken by our own loops.
constexpr int64_t kSmallWork = 1 << 18;

// Whether this thread is inside a parallel region of run_tasks.
extern thread_local bool in_parallel_tasks;

// run(task, thread) for every task in [0, count), each by whichever thread is free, first tasks first. What a task
// writes must not depend on its thread: then neither does the result. `work` is the multiply-adds of all
// together, and no less than those of any one product.
// The vendor GEMM is only called inside parallel regions, where it takes one thread: a product of several threads
// could depend on their number.
template <typename Run>
void run_tasks(int64_t count, int64_t work, const Run& run) {
  if (work < kSmallWork) {
    for (int64_t task = 0; task < count; ++task) run(task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  auto worker = [&](int64_t first, int64_t last) {
    struct Inside {
      Inside() { in_parallel_tasks = true; }
      ~Inside() { in_parallel_tasks = false; }
    } inside;
    for (int64_t thread = first; thread < last; ++thread) {
      for (int64_t task = next++; task < count; task = next++) run(task, thread);
    }
  };
  // two at least: a range of one is no parallel region
  torch::stable::parallel_for(0, std::max<int64_t>(std::min(num_threads(), count), 2), 1, worker);
}

}  // namespace mta_fast
