#include "common.h"

#include <cstring>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "vector.h"

namespace mta_fast {

using torch::headeronly::DeviceType;

// --- checks ---

const char* dtype_name(ScalarType dtype) { return torch::headeronly::toString(dtype); }

bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

void check_floating(const char* name, ScalarType dtype) {
  MTA_CHECK(is_float(dtype), name, "a floating dtype", dtype_name(dtype));
}

ScalarType dtype_of_tensor(const Tensor& tensor) {
  try {
    return tensor.scalar_type();
  } catch (const std::exception&) {
    return ScalarType::Undefined;
  }
}

void check_cpu(const char* name, const Tensor& tensor) {
  MTA_CHECK(tensor.defined(), name, "a tensor", "None");
  MTA_CHECK(tensor.device().type() == DeviceType::CPU, name, "a tensor on the CPU", "one elsewhere");
  int32_t layout;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  MTA_CHECK(layout == aoti_torch_layout_strided(), name, "a dense tensor (torch.strided)", "one of another layout");
}

void check_float(const char* name, const Tensor& tensor, int64_t dim) {
  check_cpu(name, tensor);
  const ScalarType dtype = dtype_of_tensor(tensor);
  MTA_CHECK(is_float(dtype), name, "float64, float32, bfloat16 or float16", dtype_name(dtype));
  MTA_CHECK(tensor.dim() == dim, name, std::to_string(dim) + " dimensions", tensor.dim());
  for (int64_t i = 0; i < dim; ++i) {
    MTA_CHECK(tensor.size(i) <= kMostRows, name, "sizes below 2^31", tensor.size(i));
  }
}

Tensor make_contiguous(const char* name, const Tensor& tensor) {
  try {
    return torch::stable::contiguous(tensor);
  } catch (const std::exception&) {
    refuse(name, "a tensor whose contiguous copy fits in memory", tensor.numel(), " elements");
  }
}

void check_size(const char* name, const char* what, int64_t expected, int64_t got) {
  MTA_CHECK(got == expected, name, std::to_string(expected) + " " + what, got);
}

Index::Index(const char* name, const Tensor& tensor, int64_t dim) : name_(name), owner_(tensor) {
  check_cpu(name, tensor);
  const ScalarType dtype = dtype_of_tensor(tensor);
  MTA_CHECK(dtype == ScalarType::Int, name, "int32", dtype_name(dtype));
  MTA_CHECK(tensor.dim() == dim, name, std::to_string(dim) + " dimensions", tensor.dim());
  MTA_CHECK(tensor.size(0) <= kMostRows, name, "fewer than 2^31 rows", tensor.size(0));
  owner_ = make_contiguous(name, tensor);
  data_ = data<int32_t>(std::as_const(owner_));
  size_ = tensor.size(0);
  count_ = tensor.numel();
  columns_ = dim == 1 ? 1 : tensor.size(1);
}

void Index::check_columns(int64_t columns) const { check_size(name_, "columns", columns, columns_); }

void Index::check_ranges(int64_t bound) const {
  check_columns(2);
  check_below(bound + 1);
  for (int64_t i = 0; i < size_; ++i) {
    MTA_CHECK(data_[2 * i] <= data_[2 * i + 1], name_, "start <= end in every row", "(", data_[2 * i], ", ",
              data_[2 * i + 1], ") in row ", i);
  }
}

void Index::check_distinct(int64_t bound) const {
  check_below(bound);
  bool ascends = true;  // as they mostly do
  for (int64_t i = 1; i < count_; ++i) ascends &= data_[i] > data_[i - 1];
  if (ascends) return;
  std::vector<bool> seen(bound);
  for (int64_t i = 0; i < count_; ++i) {
    MTA_CHECK(!seen[data_[i]], name_, "distinct indices", data_[i], " twice");
    seen[data_[i]] = true;
  }
}

void Index::check_below(int64_t bound) const {
  for (int64_t i = 0; i < count_; ++i) {
    MTA_CHECK(data_[i] >= 0 && data_[i] < bound, name_, "indices from 0 to " + std::to_string(bound - 1), data_[i]);
  }
}

void Index::check_ascending() const {
  for (int64_t i = 1; i < count_; ++i) {
    MTA_CHECK(data_[i] > data_[i - 1], name_, "ascending values", data_[i], " after ", data_[i - 1]);
  }
}

void Index::check_bounds() const {
  MTA_CHECK(count_ >= 1, name_, "at least 1 value", "none");
  MTA_CHECK(data_[0] == 0, name_, "0 first", data_[0]);
  for (int64_t i = 1; i < count_; ++i) {
    MTA_CHECK(data_[i] >= data_[i - 1], name_, "no decrease", data_[i]);
  }
}

void Index::check_splits(int64_t total) const {
  check_bounds();
  MTA_CHECK(data_[count_ - 1] == total, name_, std::to_string(total) + " last", data_[count_ - 1]);
}

// --- matrices ---

// A copy of its own, rows apart.
static Tensor make_dense(const char* name, const Tensor& tensor) {
  try {
    return torch::stable::contiguous(torch::stable::clone(tensor));
  } catch (const std::exception&) {
    refuse(name, "a tensor whose contiguous copy fits in memory", tensor.numel(), " elements");
  }
}

Matrix::Matrix(const char* name, const Tensor& tensor, int64_t dim) : owner(tensor) {
  check_float(name, tensor, dim);
  rows = tensor.size(0);
  cols = dim == 1 ? 1 : tensor.size(1);
  if ((dim == 1 && tensor.stride(0) != 1) || (dim == 2 && cols > 1 && tensor.stride(1) != 1)) {
    owner = make_contiguous(name, tensor);
  }
  dtype = owner.scalar_type();
  stride = dim == 1 ? 1 : owner.stride(0);
  if (dim == 2 && rows > 1 && stride < cols) {  // expanded rows; the vendor GEMM wants rows apart
    owner = make_dense(name, owner);
    stride = cols;
  }
  data_ = owner.const_data_ptr();
}

template <typename T>
void Matrix::convert(int64_t row, T* out) const {
  auto copy = [&](auto* values) {
    values += row * stride;
    for (int64_t i = 0; i < cols; ++i) out[i] = static_cast<T>(values[i]);
  };
  switch (dtype) {
    case ScalarType::Double:
      return copy(static_cast<const double*>(data_));
    case ScalarType::Float:
      return copy(static_cast<const float*>(data_));
    case ScalarType::Half:
      return copy(static_cast<const torch::headeronly::Half*>(data_));
    default: {
      if constexpr (std::is_same_v<T, float>) {  // bfloat16: the upper half of a float32
        const uint16_t* values = static_cast<const uint16_t*>(data_) + row * stride;
        for (int64_t i = 0; i < cols; ++i) {
          uint32_t bits = static_cast<uint32_t>(values[i]) << 16;
          std::memcpy(out + i, &bits, sizeof(bits));
        }
        return;
      } else {
        return copy(static_cast<const torch::headeronly::BFloat16*>(data_));
      }
    }
  }
}

template <typename T>
const T* Matrix::row(int64_t row, T* scratch) const {
  if (is<T>()) return static_cast<const T*>(data_) + row * stride;
  convert(row, scratch);
  return scratch;
}

template <typename T>
const T* Matrix::block(int64_t first, int64_t count, T* scratch, int64_t& ld) const {
  if (is<T>()) {
    ld = std::max(stride, cols);
    return static_cast<const T*>(data_) + first * stride;
  }
  ld = cols;
  for (int64_t i = 0; i < count; ++i) convert(first + i, scratch + i * cols);
  return scratch;
}

template <typename T>
void store(const T* values, int64_t count, ScalarType dtype, void* out) {
  auto copy = [&](auto* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<std::remove_pointer_t<decltype(to)>>(values[i]);
  };
  switch (dtype) {
    case ScalarType::Double:
      return copy(static_cast<double*>(out));
    case ScalarType::Float:
      return copy(static_cast<float*>(out));
    case ScalarType::Half:
      return copy(static_cast<torch::headeronly::Half*>(out));
    default:
      return copy(static_cast<torch::headeronly::BFloat16*>(out));
  }
}

template <typename T>
void scale_into(const T* from, T scale, int64_t count, ScalarType dtype, T* scratch, void* to) {
  if (dtype == dtype_of<T>) return scale_to(static_cast<T*>(to), from, scale, count);
  scale_to(scratch, from, scale, count);
  store(scratch, count, dtype, to);
}

template <typename T>
void round_to(ScalarType dtype, T* values, int64_t count) {
  auto round = [&](auto zero) {
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(static_cast<decltype(zero)>(values[i]));
  };
  if (dtype == ScalarType::BFloat16) round(torch::headeronly::BFloat16());
  if (dtype == ScalarType::Half) round(torch::headeronly::Half());
}

template <typename T>
bool scales_later(const Matrix& matrix, const T* scale, int64_t count) {
  if (!matrix.is<T>()) return false;
  constexpr T kSmallest = T(1e-15), kLargest = T(1e15);  // products of two stay within float32
  return std::all_of(scale, scale + count, [](T s) { return s >= kSmallest && s <= kLargest; });
}

template <typename T>
ScaledRows<T> scaled_rows(const Matrix& matrix, int64_t first, int64_t count, const T* scale, bool later, T* copies) {
  if (later) {
    int64_t stride;
    const T* values = matrix.block<T>(first, count, nullptr, stride);
    return {values, stride, scale};
  }
  for (int64_t i = 0; i < count; ++i) {
    T* copy = copies + i * matrix.cols;
    scale_to(copy, matrix.row<T>(first + i, copy), scale[i], matrix.cols);
  }
  return {copies, matrix.cols, nullptr};
}

#define MTA_INSTANTIATE(T)                                                  \
  template const T* Matrix::row<T>(int64_t, T*) const;                      \
  template const T* Matrix::block<T>(int64_t, int64_t, T*, int64_t&) const; \
  template void round_to<T>(ScalarType, T*, int64_t);                       \
  template void store<T>(const T*, int64_t, ScalarType, void*);             \
  template void scale_into<T>(const T*, T, int64_t, ScalarType, T*, void*); \
  template bool scales_later<T>(const Matrix&, const T*, int64_t);          \
  template ScaledRows<T> scaled_rows<T>(const Matrix&, int64_t, int64_t, const T*, bool, T*);
MTA_INSTANTIATE(float)
MTA_INSTANTIATE(double)
#undef MTA_INSTANTIATE

ScalarType compute_dtype(std::initializer_list<ScalarType> dtypes) {
  bool wide = std::find(dtypes.begin(), dtypes.end(), ScalarType::Double) != dtypes.end();
  return wide ? ScalarType::Double : ScalarType::Float;
}

void use_large_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may be refused
#else
  (void)memory, (void)bytes;
#endif
}

Tensor make_empty(const char* names, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  try {
    Tensor tensor = torch::stable::empty({sizes.begin(), sizes.size()}, dtype);
    use_large_pages(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
    return tensor;
  } catch (const std::exception&) {
    std::string shape;
    for (int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    refuse(names, "sizes whose result fits in memory", "[", shape, "] of ", dtype_name(dtype));
  }
}

// --- tasks ---

thread_local bool in_parallel_tasks = false;

int64_t num_threads() { return std::max<int64_t>(torch::stable::get_num_threads(), 1); }

}  // namespace mta_fast
