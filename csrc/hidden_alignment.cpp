// Hidden alignment (Hid): mta_fast/reference.py, part 5.
//
// The listed tokens go piece by piece. Blocks of a piece: gather h, p = P h + bias, one pass that turns p into dp in
// place, dh = dp P. Then tiles of dP += dp' h. A step works on the blocks of some pieces (one, or more where there are
// many threads) and on the tiles of the step before, so that small tasks fill the gaps which large ones leave. p is in
// memory for two steps only. Blocks, tiles and pieces do not depend on the number of threads, nor does their order.

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"
#include "gemm.h"
#include "vector.h"

namespace mta_fast {

namespace {

constexpr int64_t kBlock = 512;                      // tokens of a task, at most
constexpr int64_t kSmallestBlock = 64;               // below it the projection is read too often
constexpr int64_t kLargestPiece = 2048;              // tokens
constexpr int64_t kPieceValues = 1 << 23;            // of h and p of a piece: 32 MB of float32
constexpr int64_t kTileRows = 128, kTileCols = 512;  // of a task of the projection's gradient, at most

// The largest size up to `most` that splits `total` into parts that are nearly equal, their number a multiple of
// `multiple`.
int64_t even_size(int64_t total, int64_t most, int64_t multiple = 1) {
  const int64_t parts = ceil_div(ceil_div(total, most), multiple) * multiple;
  return std::max<int64_t>(ceil_div(total, std::max<int64_t>(parts, 1)), 1);
}

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
        piece_(even_size(in.tokens.size(), std::clamp(kPieceValues / (ds_ + dt_), kBlock, kLargestPiece))),
        block_(std::max(even_size(piece_, kBlock, 2), kSmallestBlock)),
        step_(piece_ * ceil_div(num_threads() * block_, piece_)),
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
  }

  // The numerator; gradients are written.
  double run() {
    const int64_t steps = ceil_div(in_.tokens.size(), step_), tile_cols = even_size(ds_, kTileCols);
    const int64_t across = ceil_div(ds_, tile_cols), tiles = ceil_div(dt_, kTileRows) * across;
    double numerator = 0;
    for (int64_t s = 0; s <= steps; ++s) {
      const Step now = step(s), before = step(s - 1);
      const bool multiply = gradient_.student != nullptr && before.count > 0;
      const std::vector<Block> blocks = blocks_of(now);
      std::vector<double> parts(blocks.size());
      const int64_t num_blocks = static_cast<int64_t>(blocks.size());
      run_tasks(num_blocks + (multiply ? tiles : 0), (now.count + before.count) * dt_ * ds_,
                [&](int64_t task, int64_t) {
                  if (task < num_blocks) {
                    parts[task] = align_block(now, blocks[task]);
                  } else {
                    const int64_t tile = task - num_blocks;
                    add_projection_gradient(before, tile / across * kTileRows, tile % across * tile_cols, tile_cols);
                  }
                });
      for (double part : parts) numerator += part;
    }
    return numerator;
  }

 private:
  // Listed tokens [first, first + count): their h and p.
  struct Step {
    int64_t first, count;
    T *states, *projected;
  };
  // Tokens [begin, end) of a step, all of one piece.
  struct Block {
    int64_t begin, end;
  };

  Step step(int64_t s) {
    const int64_t first = std::clamp<int64_t>(s * step_, 0, in_.tokens.size());
    const int64_t count = s < 0 ? 0 : std::min(step_, in_.tokens.size() - first);
    Buffer& buffer = buffers_[s & 1];
    return {first, count, buffer.states.get(count * ds_), buffer.projected.get(count * dt_)};
  }

  std::vector<Block> blocks_of(const Step& step) const {
    std::vector<Block> blocks;
    for (int64_t piece = 0; piece < step.count; piece += piece_) {
      const int64_t end = std::min(step.count, piece + piece_);
      for (int64_t begin = piece; begin < end; begin += block_)
        blocks.push_back({begin, std::min(end, begin + block_)});
    }
    return blocks;
  }

  // h and dp of the block to the step's memory, dh to the result; the block's part of the numerator.
  double align_block(const Step& step, const Block& block) {
    const int64_t count = block.end - block.begin, first = step.first + block.begin;
    T *h = step.states + block.begin * ds_, *p = step.projected + block.begin * dt_;
    for (int64_t c = 0; c < count; ++c) {
      const T* state = in_.student.row<T>(in_.tokens[first + c], h + c * ds_);
      if (state != h + c * ds_) std::copy(state, state + ds_, h + c * ds_);
      round_to(in_.matmul_dtype, h + c * ds_, ds_);
    }
    gemm(View<T>(h, count, ds_, ds_), projection_.transposed(), p, dt_);
    Scratch<T> state(dt_);
    double numerator = 0;
    for (int64_t c = 0; c < count; ++c) {
      if (in_.bias) add_scaled(p + c * dt_, bias_.get(), T(1), dt_);
      numerator += align(p + c * dt_, in_.teacher.row<T>(in_.tokens[first + c], state.get()), first + c);
    }
    if (gradient_.student != nullptr) write_student_gradient(p, count, first);
    return numerator;
  }

  // g (1 - cos(p, t)); p becomes its gradient -g (t / |t| - cos p / |p|) / |p|.
  double align(T* p, const T* t, int64_t listed) const {
    T found[3], scratch;
    cosine(p, t, dt_, found);
    const auto [p_scale, t_scale, cos] = found;
    const T g = *in_.weights.row<T>(listed, &scratch);
    if (gradient_.student != nullptr) cosine_gradient(p, t, p_scale, t_scale, cos, g * p_scale, dt_);
    return static_cast<double>(g * (1 - cos));
  }

  void write_student_gradient(const T* dp, int64_t count, int64_t listed) const {
    const View<T> left(dp, count, dt_, dt_);
    if (gradient_.dtype == dtype_of<T>) {
      gemm(left, projection_, reinterpret_cast<T*>(gradient_.student) + listed * ds_, ds_);
      return;
    }
    Scratch<T> dh(count * ds_);
    gemm(left, projection_, dh.get(), ds_);
    store(dh.get(), count * ds_, gradient_.dtype, gradient_.student + listed * ds_ * 2);  // bfloat16
  }

  // A tile of dP += dp' h, piece by piece; the tile's rows of dbias += sum dp with the first column.
  void add_projection_gradient(const Step& step, int64_t row, int64_t col, int64_t tile_cols) const {
    const int64_t rows = std::min(kTileRows, dt_ - row), cols = std::min(tile_cols, ds_ - col);
    T* out = gradient_.projection + row * ds_ + col;
    for (int64_t begin = 0; begin < step.count; begin += piece_) {
      const int64_t tokens = std::min(piece_, step.count - begin);
      const View<T> left = View<T>(step.projected + begin * dt_ + row, tokens, rows, dt_).transposed();
      const View<T> right(step.states + begin * ds_ + col, tokens, cols, ds_);
      if (step.first + begin == 0) {
        gemm(left, right, out, ds_);
      } else {
        gemm_add(left, right, T(1), out, ds_);
      }
      if (gradient_.bias != nullptr && col == 0) {
        add_bias_gradient(step.projected + begin * dt_ + row, tokens, rows, step.first + begin == 0,
                          gradient_.bias + row);
      }
    }
  }

  // In float64 over the groups of a piece: a long chain of float32 sums would lose digits.
  void add_bias_gradient(const T* dp, int64_t tokens, int64_t features, bool is_first, T* out) const {
    constexpr int64_t kGroup = 64;
    std::vector<double> sums(features, 0.0);
    std::vector<T> part(features);
    for (int64_t begin = 0; begin < tokens; begin += kGroup) {
      std::fill(part.begin(), part.end(), T(0));
      for (int64_t c = begin; c < std::min(tokens, begin + kGroup); ++c) {
        add_scaled(part.data(), dp + c * dt_, T(1), features);
      }
      for (int64_t i = 0; i < features; ++i) sums[i] += part[i];
    }
    for (int64_t i = 0; i < features; ++i) out[i] = static_cast<T>((is_first ? 0.0 : out[i]) + sums[i]);
  }

  const Inputs& in_;
  const Gradient<T> gradient_;
  const int64_t ds_, dt_, piece_, block_, step_;
  View<T> projection_;
  Scratch<T> projection_copy_, bias_;
  struct Buffer {
    Scratch<T> states, projected;
  };
  Buffer buffers_[2];  // of steps with even and with odd numbers
};

// out [num_tokens, cols] = scale * the row that `source` names for each token, 0 where it names none (-1).
template <typename T>
void spread(const Matrix& rows, const std::vector<int32_t>& source, T scale, Tensor& out) {
  constexpr int64_t kRowsPerTask = 64;
  const int64_t d = rows.cols, count = static_cast<int64_t>(source.size()), bytes = d * out.element_size();
  const ScalarType dtype = out.scalar_type();
  char* to = static_cast<char*>(out.mutable_data_ptr());
  run_tasks(ceil_div(count, kRowsPerTask), count * d, [&](int64_t task, int64_t) {
    Scratch<T> row(d), scaled(d);
    for (int64_t j = task * kRowsPerTask; j < std::min(count, (task + 1) * kRowsPerTask); ++j) {
      if (source[j] < 0) {
        std::memset(to + j * bytes, 0, bytes);
      } else {
        scale_into(rows.row<T>(source[j], row.get()), scale, d, dtype, scaled.get(), to + j * bytes);
      }
    }
  });
}

}  // namespace

// student [T, d_S], teacher [T, d_T], tokens [C], weights [C], proj_weight [d_T, d_S], proj_bias [d_T] or none ->
// numerator, and the gradients of the listed tokens [C, d_S] (bfloat16 for a bfloat16 student), of the weight and of
// the bias (empty where there is none). See reference.hidden_alignment.
std::tuple<Tensor, Tensor, Tensor, Tensor> hidden_alignment(const Tensor& student, const Tensor& teacher,
                                                            const Tensor& tokens, const Tensor& weights,
                                                            const Tensor& proj_weight, std::optional<Tensor> proj_bias,
                                                            ScalarType matmul_dtype, bool with_gradient) {
  Inputs in{Matrix("student", student),
            Matrix("teacher", teacher),
            Index("tokens", tokens, 1),
            Matrix("weights", weights, 1),
            Matrix("proj_weight", proj_weight),
            std::nullopt,
            matmul_dtype};
  const int64_t ds = in.student.cols, dt = in.teacher.cols;
  MTA_CHECK(ds >= 1 && dt >= 1, "student, teacher", "widths of at least 1", ds, " and ", dt);
  check_size("teacher", "tokens, as in student", in.student.rows, in.teacher.rows);
  check_size("weights", "values, as in tokens", in.tokens.size(), in.weights.rows);
  check_size("proj_weight", "rows, the teacher's width", dt, in.projection.rows);
  check_size("proj_weight", "columns, the student's width", ds, in.projection.cols);
  check_floating("matmul_dtype", matmul_dtype);
  if (proj_bias) {
    in.bias.emplace("proj_bias", *proj_bias, 1);
    check_size("proj_bias", "values, the teacher's width", dt, in.bias->rows);
  }
  in.tokens.check_distinct(in.student.rows);
  const ScalarType dtype = compute_dtype({in.student.dtype, in.teacher.dtype, in.projection.dtype});
  const ScalarType kept = in.student.dtype == ScalarType::BFloat16 ? ScalarType::BFloat16 : dtype;
  const int64_t rows = with_gradient ? in.tokens.size() : 0, features = with_gradient ? dt : 0;
  Tensor numerator = make_empty("student", {}, dtype), listed = make_empty("student, tokens", {rows, ds}, kept);
  Tensor weight = make_empty("proj_weight", {features, ds}, dtype);
  Tensor bias = make_empty("proj_bias", {proj_bias ? features : 0}, dtype);
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

// What hidden_alignment left (rows of the listed tokens [C, d_S], weight, bias), times the scalar `grad` ->
// [num_tokens, d_S] (0 elsewhere), weight, bias, each in its dtype; see reference.hidden_alignment_gradient.
std::tuple<Tensor, Tensor, Tensor> hidden_alignment_gradient(const Tensor& rows, const Tensor& weight,
                                                             const Tensor& bias, const Tensor& tokens,
                                                             const Tensor& grad, int64_t num_tokens,
                                                             ScalarType student_dtype, ScalarType weight_dtype,
                                                             ScalarType bias_dtype) {
  Matrix listed("rows", rows), matrix("weight", weight), vector("bias", bias, 1);
  Index index("tokens", tokens, 1);
  check_cpu("grad", grad);
  check_size("grad", "value", 1, grad.numel());
  Matrix factor("grad", torch::stable::reshape(grad, {-1}), 1);
  check_size("tokens", "tokens, as in rows", listed.rows, index.size());
  MTA_CHECK(matrix.rows >= 1 && matrix.cols >= 1, "weight", "at least 1 row and 1 column", matrix.rows, " and ",
            matrix.cols);
  check_size("rows", "columns, as in weight", matrix.cols, listed.cols);
  MTA_CHECK(vector.rows == 0 || vector.rows == matrix.rows, "bias",
            "no values or " + std::to_string(matrix.rows) + ", as weight has rows", vector.rows);
  MTA_CHECK(num_tokens >= 0 && num_tokens <= kMostRows, "num_tokens", "a number of tokens from 0 to 2^31 - 1",
            num_tokens);
  check_floating("student_dtype", student_dtype);
  check_floating("weight_dtype", weight_dtype);
  check_floating("bias_dtype", bias_dtype);
  index.check_distinct(num_tokens);
  Tensor out = make_empty("num_tokens, rows", {num_tokens, listed.cols}, student_dtype);
  Tensor out_weight = make_empty("weight", {matrix.rows, matrix.cols}, weight_dtype);
  Tensor out_bias = make_empty("bias", {vector.rows}, bias_dtype);
  std::vector<int32_t> source(num_tokens, -1), all(matrix.rows);
  for (int64_t c = 0; c < index.size(); ++c) source[index[c]] = static_cast<int32_t>(c);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int32_t>(i);
  dispatch(compute_dtype({matrix.dtype}), [&](auto zero) {
    using T = decltype(zero);
    T scratch;
    const T scale = *factor.row<T>(0, &scratch);
    spread<T>(listed, source, scale, out);
    spread<T>(matrix, all, scale, out_weight);
    for (int64_t i = 0; i < vector.rows; ++i) {
      T value;
      scale_into(vector.row<T>(i, &value), scale, 1, bias_dtype, &value,
                 static_cast<char*>(out_bias.mutable_data_ptr()) + i * out_bias.element_size());
    }
  });
  return {out, out_weight, out_bias};
}

}  // namespace mta_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mta_fast_cpp, m) {
  m.def(
      "hidden_alignment(Tensor student, Tensor teacher, Tensor tokens, Tensor weights, Tensor proj_weight, "
      "Tensor? proj_bias, ScalarType matmul_dtype, bool with_gradient) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "hidden_alignment_gradient(Tensor rows, Tensor weight, Tensor bias, Tensor tokens, Tensor grad, int num_tokens, "
      "ScalarType student_dtype, ScalarType weight_dtype, ScalarType bias_dtype) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mta_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("hidden_alignment", TORCH_BOX(&mta_fast::hidden_alignment));
  m.impl("hidden_alignment_gradient", TORCH_BOX(&mta_fast::hidden_alignment_gradient));
}
