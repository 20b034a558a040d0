// Hidden alignment (Hid): mta_fast/reference.py, part 5.
//
// The listed tokens go chunk by chunk. Blocks of a chunk: gather h, p = P h + bias, one pass that turns p into dp in
// place, dh = dp P. Then tiles of dP += dp' h over the whole chunk. p is in memory for one chunk only.

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"
#include "gemm.h"
#include "vector.h"

namespace mta_fast {

namespace {

constexpr int64_t kBlock = 128;            // tokens of a task; features of a task of the projection's gradient
constexpr int64_t kLargestChunk = 2048;    // tokens
constexpr int64_t kChunkValues = 1 << 23;  // of h and p of a chunk: 32 MB of float32

struct Inputs {
  Matrix student, teacher;  // [T, d_S], [T, d_T]
  Index tokens;             // [C]
  Matrix weights;           // [C]
  Matrix projection;        // [d_T, d_S]
  std::optional<Matrix> bias;
  ScalarType matmul_dtype;
};

// Where the gradients go; null pointers where none is wanted.
template <typename T>
struct Gradient {
  char* student;  // [C, d_S] in `dtype`
  ScalarType dtype;
  T* projection;  // [d_T, d_S]
  T* bias;        // [d_T]
};

template <typename T>
class Alignment {
 public:
  Alignment(const Inputs& in, const Gradient<T>& gradient)
      : in_(in),
        gradient_(gradient),
        ds_(in.student.cols),
        dt_(in.teacher.cols),
        chunk_(std::clamp(kChunkValues / (ds_ + dt_) / kBlock * kBlock, kBlock, kLargestChunk)),
        projection_(nullptr, 0, 0, 0),
        bias_(dt_) {
    const bool as_it_is = in.projection.is<T>() && !narrows(in.matmul_dtype);
    T* copy = as_it_is ? nullptr : projection_copy_.get(dt_ * ds_);
    for (int64_t i = 0; !as_it_is && i < dt_; ++i) {
      scale_to(copy + i * ds_, in.projection.row<T>(i, copy + i * ds_), T(1), ds_);
      round_to(in.matmul_dtype, copy + i * ds_, ds_);
    }
    int64_t stride = ds_;
    const T* values = as_it_is ? in.projection.block<T>(0, dt_, nullptr, stride) : copy;
    projection_ = View<T>(values, dt_, ds_, stride);
    for (int64_t i = 0; in.bias && i < dt_; ++i) bias_.get()[i] = *in.bias->row<T>(i, bias_.get() + i);
    const int64_t tokens = std::min(chunk_, in.tokens.size());
    states_.get(tokens * ds_);
    projected_.get(tokens * dt_);
  }

  // The numerator; gradients are written.
  double run() {
    double numerator = 0;
    for (int64_t first = 0; first < in_.tokens.size(); first += chunk_) {
      const int64_t count = std::min(chunk_, in_.tokens.size() - first);
      std::vector<double> parts(ceil_div(count, kBlock));
      run_tasks(parts.size(), count * dt_ * ds_, [&](int64_t task, int64_t) {
        const int64_t begin = task * kBlock;
        parts[task] = align_block(first, begin, std::min(count, begin + kBlock));
      });
      for (double part : parts) numerator += part;
      if (gradient_.student != nullptr) {
        run_tasks(ceil_div(dt_, kBlock), count * dt_ * ds_, [&](int64_t task, int64_t) {
          const int64_t begin = task * kBlock;
          add_projection_gradient(first, count, begin, std::min(dt_, begin + kBlock));
        });
      }
    }
    return numerator;
  }

 private:
  // Tokens [begin, end) of the chunk from `first` on: h and dp to the chunk's memory, dh to the result.
  double align_block(int64_t first, int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    T *h = states_.get() + begin * ds_, *p = projected_.get() + begin * dt_;
    for (int64_t c = 0; c < count; ++c) {
      const T* state = in_.student.row<T>(in_.tokens[first + begin + c], h + c * ds_);
      if (state != h + c * ds_) std::copy(state, state + ds_, h + c * ds_);
      round_to(in_.matmul_dtype, h + c * ds_, ds_);
    }
    gemm(View<T>(h, count, ds_, ds_), projection_.transposed(), p, dt_);
    Scratch<T> state(dt_);
    double numerator = 0;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t listed = first + begin + c;
      if (in_.bias) add_scaled(p + c * dt_, bias_.get(), T(1), dt_);
      numerator += align(p + c * dt_, in_.teacher.row<T>(in_.tokens[listed], state.get()), listed);
    }
    if (gradient_.student != nullptr) write_student_gradient(p, count, first + begin);
    return numerator;
  }

  // g (1 - cos(p, t)); p becomes its gradient -g (t / (|p| |t|) - cos p / |p|^2).
  double align(T* p, const T* t, int64_t listed) const {
    T products[3], scratch;
    dots(p, t, dt_, products);
    const T g = *in_.weights.row<T>(listed, &scratch), p_scale = reciprocal(std::sqrt(products[0]));
    const T scale = p_scale * reciprocal(std::sqrt(products[1])), cosine = products[2] * scale;
    if (gradient_.student != nullptr) combine(p, t, g * cosine * p_scale * p_scale, -g * scale, dt_);
    return static_cast<double>(g * (1 - cosine));
  }

  void write_student_gradient(const T* dp, int64_t count, int64_t listed) const {
    const View<T> left(dp, count, dt_, dt_);
    if (gradient_.dtype == dtype_of<T>) {
      gemm(left, projection_, reinterpret_cast<T*>(gradient_.student) + listed * ds_, ds_);
      return;
    }
    Scratch<T> dh(count * ds_);
    gemm(left, projection_, dh.get(), ds_);
    store(dh.get(), count * ds_, gradient_.dtype, gradient_.student + listed * ds_ * 2);  // kept in two bytes
  }

  // Features [begin, end) of dP += dp' h and of dbias += sum dp, over the chunk.
  void add_projection_gradient(int64_t first, int64_t count, int64_t begin, int64_t end) const {
    const View<T> left = View<T>(projected_.get() + begin, count, end - begin, dt_).transposed();
    const View<T> right(states_.get(), count, ds_, ds_);
    T* out = gradient_.projection + begin * ds_;
    if (first == 0) {
      gemm(left, right, out, ds_);
    } else {
      gemm_add(left, right, T(1), out, ds_);
    }
    if (gradient_.bias == nullptr) return;
    if (first == 0) std::fill(gradient_.bias + begin, gradient_.bias + end, T(0));
    for (int64_t c = 0; c < count; ++c) {
      add_scaled(gradient_.bias + begin, projected_.get() + c * dt_ + begin, T(1), end - begin);
    }
  }

  const Inputs& in_;
  const Gradient<T> gradient_;
  const int64_t ds_, dt_, chunk_;
  View<T> projection_;
  Scratch<T> projection_copy_, bias_, states_, projected_;
};

}  // namespace

// student [T, d_S], teacher [T, d_T], tokens [C], weights [C], proj_weight [d_T, d_S], proj_bias [d_T] or none ->
// numerator, and the gradients of the listed tokens [C, d_S] (bfloat16 for a bfloat16 student), of the weight and of
// the bias (empty where there is none). See reference.hidden_alignment.
std::tuple<Tensor, Tensor, Tensor, Tensor> hidden_alignment(const Tensor& student, const Tensor& teacher,
                                                            const Tensor& tokens, const Tensor& weights,
                                                            const Tensor& proj_weight, std::optional<Tensor> proj_bias,
                                                            ScalarType matmul_dtype, bool with_gradient) {
  Inputs in{Matrix("student", student),         Matrix("teacher", teacher),
            Index("tokens", tokens, 1),         Matrix("weights", weights, 1),
            Matrix("proj_weight", proj_weight), std::nullopt,
            matmul_dtype};
  const int64_t ds = in.student.cols, dt = in.teacher.cols;
  check_size("teacher", "tokens, as in student", in.student.rows, in.teacher.rows);
  check_size("weights", "values, as in tokens", in.tokens.size(), in.weights.rows);
  check_size("proj_weight", "rows, the teacher's width", dt, in.projection.rows);
  check_size("proj_weight", "columns, the student's width", ds, in.projection.cols);
  MTA_CHECK(is_float(matmul_dtype), "matmul_dtype", "a floating dtype", dtype_name(matmul_dtype));
  if (proj_bias) {
    in.bias.emplace("proj_bias", *proj_bias, 1);
    check_size("proj_bias", "values, the teacher's width", dt, in.bias->rows);
  }
  in.tokens.check_below(in.student.rows);
  const ScalarType dtype = compute_dtype({in.student.dtype, in.teacher.dtype, in.projection.dtype});
  const ScalarType kept = in.student.dtype == ScalarType::BFloat16 ? ScalarType::BFloat16 : dtype;
  const int64_t rows = with_gradient ? in.tokens.size() : 0, features = with_gradient ? dt : 0;
  Tensor numerator = make_empty({}, dtype), listed = make_empty({rows, ds}, kept);
  Tensor weight = make_empty({features, ds}, dtype), bias = make_empty({proj_bias ? features : 0}, dtype);
  if (rows == 0) {
    torch::stable::zero_(weight);
    torch::stable::zero_(bias);
  }
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    Gradient<T> gradient{nullptr, kept, nullptr, nullptr};
    if (with_gradient) {
      gradient = {static_cast<char*>(listed.mutable_data_ptr()), kept, data<T>(weight),
                  proj_bias ? data<T>(bias) : nullptr};
    }
    *data<T>(numerator) = static_cast<T>(Alignment<T>(in, gradient).run());
  });
  return {numerator, listed, weight, bias};
}

}  // namespace mta_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mta_fast_cpp, m) {
  m.def(
      "hidden_alignment(Tensor student, Tensor teacher, Tensor tokens, Tensor weights, Tensor proj_weight, "
      "Tensor? proj_bias, ScalarType matmul_dtype, bool with_gradient) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mta_fast_cpp, CPU, m) { m.impl("hidden_alignment", TORCH_BOX(&mta_fast::hidden_alignment)); }
