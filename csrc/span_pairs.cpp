// Span pairs (DSA), pairwise: mta_fast/reference.py, part 4.
//
// Rows of up to kHeldSpans spans hold the errors of their pairs: blocks of spans against those from the block on, both
// cosines a block, mirrored. Longer rows go strip by strip. Then, in the same memory, the errors become the weights of
// the gradient's product. Rows of `gram_from` spans and more take the Gram form (gram.cpp).

#include "span_pairs.h"

#include <tuple>
#include <vector>

#include "gemm.h"
#include "vector.h"

namespace mta_fast {

template <typename T>
void tangent(const T* state, T unit, T factor, int64_t d, T* pull) {
  const T radial = dot(pull, state, d) * unit;
  combine(pull, state, factor, -factor * radial * unit, d);
}

template void tangent<float>(const float*, float, float, int64_t, float*);
template void tangent<double>(const double*, double, double, int64_t, double*);

namespace {

constexpr int64_t kHeldSpans = 1024;       // errors of a held row: 4 MB of float32
constexpr int64_t kGroupErrors = 1 << 20;  // held rows are worked on in groups of at least 4 MB of errors
constexpr int64_t kGroupStates = 1 << 22;  // unless their pooled spans, where those are copied, reach 16 MB a thread
constexpr int64_t kBlocksPerThread = 8;    // and at least this many blocks, so that the threads finish together
constexpr int64_t kStripErrors = 1 << 21;  // errors of a strip: 8 MB of float32 for each thread
constexpr int64_t kStripTile = 512;        // spans that a strip is multiplied with at once

int64_t block_of(int64_t spans) { return spans <= 256 ? 64 : 128; }

// Both sides of a row as the products read them.
template <typename T>
struct Sides {
  ScaledRows<T> student, teacher;
};

// e [n] from student products (in place) and teacher products: the differences of the cosines of span `u` and the
// spans from `first` on; 0 with itself.
template <typename T>
void errors_of(const Sides<T>& sides, int64_t u, int64_t first, int64_t n, const T* ones, T* errors,
               const T* products) {
  auto from = [&](const ScaledRows<T>& side) { return side.scale == nullptr ? ones : side.scale + first; };
  cosine_error(errors, from(sides.student), sides.student.factor(u), products, from(sides.teacher),
               sides.teacher.factor(u), n);
  if (u >= first && u < first + n) errors[u - first] = 0;
}

// The numerator's part of span `u`, and its errors [n] to their weights in the gradient.
template <typename T>
double consume(const SpanPairs<T>& pairs, const SpanRow& row, const Sides<T>& sides, int64_t u, T* errors) {
  const T* weight = pairs.weight + row.first;
  const double part = static_cast<double>(weight[u]) * weighted_squares(errors, weight, row.size());
  if (pairs.gradient != nullptr) {
    multiply(errors, weight, T(1), row.size());
    if (sides.student.scale != nullptr) multiply(errors, sides.student.scale, T(1), row.size());
  }
  return part;
}

// The gradient of spans [begin, end) from their weights [end - begin, n], rows `ld` apart.
template <typename T>
void gradient_of(const SpanPairs<T>& pairs, const SpanRow& row, const Sides<T>& sides, int64_t begin, int64_t end,
                 const T* weights, int64_t ld) {
  const int64_t d = pairs.student.cols;
  T* out = pairs.gradient + (row.first + begin) * d;
  gemm(View<T>(weights, end - begin, row.size(), ld),
       View<T>(sides.student.values, row.size(), d, sides.student.stride), out, d);
  for (int64_t u = begin; u < end; ++u) {
    const T factor = 4 * pairs.weight[row.first + u] * pairs.student_scale[row.first + u];
    tangent(sides.student.values + u * sides.student.stride, sides.student.factor(u), factor, d, out + (u - begin) * d);
  }
}

// --- rows that hold their errors ---

template <typename T>
class HeldRows {
 public:
  HeldRows(const SpanPairs<T>& pairs, T* numerator) : pairs_(pairs), numerator_(numerator), ones_(kHeldSpans) {
    std::fill(ones_.get(), ones_.get() + kHeldSpans, T(1));
  }

  void add(int64_t index, const SpanRow& row) {
    const int64_t block = block_of(row.size());
    for (int64_t u = 0; u < row.size(); u += block) {
      blocks_.push_back({static_cast<int64_t>(rows_.size()), u, std::min(u + block, row.size()), 0});
    }
    rows_.push_back({index, row, num_errors_, {}});
    num_errors_ += row.size() * row.size();
  }

  bool enough() const {
    const int64_t spans = rows_.back().row.last - rows_.front().row.first;  // copied as one where a row must be
    if (spans * (pairs_.student.cols + pairs_.teacher.cols) > kGroupStates * num_threads()) return true;
    return num_errors_ >= kGroupErrors && static_cast<int64_t>(blocks_.size()) >= kBlocksPerThread * num_threads();
  }

  // Works on the rows that were added and forgets them.
  void run() {
    const int64_t d = pairs_.student.cols + pairs_.teacher.cols;
    errors_.get(num_errors_);
    prepare();
    std::vector<Scratch<T>> products(std::max<int64_t>(num_threads(), 2));
    run_tasks(blocks_.size(), num_errors_ * d, [&](int64_t task, int64_t thread) {
      multiply_block(blocks_[task], rows_[blocks_[task].row], products[thread]);
    });
    run_tasks(blocks_.size(), num_errors_ * d,
              [&](int64_t task, int64_t) { consume_block(blocks_[task], rows_[blocks_[task].row]); });
    std::vector<double> sums(rows_.size());
    for (const Block& block : blocks_) sums[block.row] += block.numerator;
    for (size_t r = 0; r < rows_.size(); ++r) numerator_[rows_[r].index] = static_cast<T>(sums[r]);
    rows_.clear();
    blocks_.clear();
    num_errors_ = 0;
  }

 private:
  struct Held {
    int64_t index;
    SpanRow row;
    int64_t errors;  // where its part of errors_ begins
    Sides<T> sides;
  };
  struct Block {
    int64_t row, begin, end;
    double numerator;
  };

  // Both sides of every row, copied where they can't be multiplied as they are.
  void prepare() {
    const int64_t ds = pairs_.student.cols, dt = pairs_.teacher.cols;
    const int64_t first = rows_.front().row.first, spans = rows_.back().row.last - first;
    std::vector<std::pair<char, char>> later(rows_.size());  // row by row: a row's bits don't depend on its neighbours
    int64_t copied = 0;
    for (size_t r = 0; r < rows_.size(); ++r) {
      const SpanRow& row = rows_[r].row;
      later[r] = {scales_later(pairs_.student, pairs_.student_scale + row.first, row.size()),
                  scales_later(pairs_.teacher, pairs_.teacher_scale + row.first, row.size())};
      if (!later[r].first) copies_s_.get(spans * ds);
      if (!later[r].second) copies_t_.get(spans * dt);
      copied += later[r].first && later[r].second ? 0 : row.size() * (ds + dt);
    }
    run_tasks(rows_.size(), copied, [&](int64_t r, int64_t) {
      const SpanRow& row = rows_[r].row;
      const int64_t at = row.first - first;
      auto side = [&](const Matrix& matrix, const T* scale, bool as_is, const Scratch<T>& copies) {
        return scaled_rows(matrix, row.first, row.size(), scale + row.first, as_is,
                           as_is ? nullptr : copies.get() + at * matrix.cols);
      };
      rows_[r].sides = {side(pairs_.student, pairs_.student_scale, later[r].first != 0, copies_s_),
                        side(pairs_.teacher, pairs_.teacher_scale, later[r].second != 0, copies_t_)};
    });
  }

  // Errors of the block's spans with the spans from the block on, and the same below the diagonal.
  void multiply_block(const Block& block, const Held& held, Scratch<T>& scratch) {
    const int64_t n = held.row.size(), width = n - block.begin, count = block.end - block.begin;
    T* errors = errors_.get() + held.errors;
    T* products = scratch.get(count * width);
    auto product = [&](const Matrix& side, const ScaledRows<T>& rows, T* out, int64_t ld) {
      const T* from = rows.values + block.begin * rows.stride;
      gemm(View<T>(from, count, side.cols, rows.stride), View<T>(from, width, side.cols, rows.stride).transposed(), out,
           ld);
    };
    product(pairs_.student, held.sides.student, errors + block.begin * n + block.begin, n);
    product(pairs_.teacher, held.sides.teacher, products, width);
    for (int64_t u = block.begin; u < block.end; ++u) {
      errors_of(held.sides, u, block.begin, width, ones_.get(), errors + u * n + block.begin,
                products + (u - block.begin) * width);
    }
    for (int64_t v = block.end; v < n; ++v) {
      for (int64_t u = block.begin; u < block.end; ++u) errors[v * n + u] = errors[u * n + v];
    }
  }

  void consume_block(Block& block, const Held& held) {
    const int64_t n = held.row.size();
    T* errors = errors_.get() + held.errors;
    for (int64_t u = block.begin; u < block.end; ++u) {
      block.numerator += consume(pairs_, held.row, held.sides, u, errors + u * n);
    }
    if (pairs_.gradient != nullptr) {
      gradient_of(pairs_, held.row, held.sides, block.begin, block.end, errors + block.begin * n, n);
    }
  }

  const SpanPairs<T>& pairs_;
  T* numerator_;
  std::vector<Held> rows_;
  std::vector<Block> blocks_;
  int64_t num_errors_ = 0;
  Scratch<T> ones_, copies_s_, copies_t_, errors_;
};

// --- rows that go strip by strip ---

template <typename T>
T strip_row(const SpanPairs<T>& pairs, const SpanRow& row) {
  const int64_t n = row.size(), ds = pairs.student.cols, dt = pairs.teacher.cols;
  const int64_t strip = std::clamp<int64_t>(kStripErrors / n / 32 * 32, 32, 256), tasks = ceil_div(n, strip);
  Scratch<T> copies_s, copies_t, ones(kStripTile);
  std::fill(ones.get(), ones.get() + kStripTile, T(1));
  auto side = [&](const Matrix& matrix, const T* scale, Scratch<T>& copies) {
    const bool later = scales_later(matrix, scale, n);
    return scaled_rows(matrix, row.first, n, scale, later, later ? nullptr : copies.get(n * matrix.cols));
  };
  const Sides<T> sides = {side(pairs.student, pairs.student_scale + row.first, copies_s),
                          side(pairs.teacher, pairs.teacher_scale + row.first, copies_t)};
  struct Workspace {
    Scratch<T> errors, products;
  };
  std::vector<Workspace> workspaces(std::max<int64_t>(num_threads(), 2));
  std::vector<double> numerators(tasks, 0.0);
  run_tasks(tasks, n * n * (2 * ds + dt), [&](int64_t task, int64_t thread) {
    const int64_t begin = task * strip, end = std::min(n, begin + strip), count = end - begin;
    T* errors = workspaces[thread].errors.get(count * n);
    T* products = workspaces[thread].products.get(count * kStripTile);
    for (int64_t v = 0; v < n; v += kStripTile) {
      const int64_t width = std::min(kStripTile, n - v);
      auto product = [&](const ScaledRows<T>& rows, int64_t d, T* out, int64_t ld) {
        gemm(View<T>(rows.values + begin * rows.stride, count, d, rows.stride),
             View<T>(rows.values + v * rows.stride, width, d, rows.stride).transposed(), out, ld);
      };
      product(sides.student, ds, errors + v, n);
      product(sides.teacher, dt, products, width);
      for (int64_t u = begin; u < end; ++u) {
        errors_of(sides, u, v, width, ones.get(), errors + (u - begin) * n + v, products + (u - begin) * width);
      }
    }
    for (int64_t u = begin; u < end; ++u) {
      numerators[task] += consume(pairs, row, sides, u, errors + (u - begin) * n);
    }
    if (pairs.gradient != nullptr) gradient_of(pairs, row, sides, begin, end, errors, n);
  });
  double sum = 0;
  for (double part : numerators) sum += part;
  return static_cast<T>(sum);
}

// --- all rows ---

template <typename T>
Scratch<T> converted(const char* name, const Tensor& tensor, bool inverted) {
  const Values<T> values(name, tensor);
  Scratch<T> out(values.size());
  for (int64_t i = 0; i < values.size(); ++i) out.get()[i] = inverted ? inverse_norm(values[i]) : values[i];
  return out;
}

template <typename T>
void run_rows(const Matrix& student, const Matrix& teacher, const Tensor& weights, const Tensor& student_norm,
              const Tensor& teacher_norm, const Index& splits, int64_t gram_from, T* numerator, T* denominator,
              T* gradient) {
  const Scratch<T> weight = converted<T>("weights", weights, false);
  const Scratch<T> scale_s = converted<T>("student_norm", student_norm, true);
  const Scratch<T> scale_t = converted<T>("teacher_norm", teacher_norm, true);
  const SpanPairs<T> pairs{student, teacher, scale_s.get(), scale_t.get(), weight.get(), gradient};
  HeldRows<T> held(pairs, numerator);
  bool waiting = false;
  for (int64_t b = 0; b + 1 < splits.size(); ++b) {
    const SpanRow row{splits[b], splits[b + 1]};
    double sum = 0, squares = 0;
    for (int64_t u = row.first; u < row.last; ++u) {
      sum += weight.get()[u];
      squares += static_cast<double>(weight.get()[u]) * weight.get()[u];
    }
    denominator[b] = static_cast<T>(sum * sum - squares);
    numerator[b] = 0;
    if (row.size() == 0) continue;
    if (gram_from >= 0 && row.size() >= gram_from) {
      numerator[b] = gram_row(pairs, row);
    } else if (row.size() <= kHeldSpans) {
      held.add(b, row);
      waiting = !held.enough();
      if (!waiting) held.run();
    } else {
      numerator[b] = strip_row(pairs, row);
    }
  }
  if (waiting) held.run();
}

}  // namespace

// student [N, d_S], teacher [N, d_T], weights, norms [N], span_splits [B + 1] -> num [B], den [B] and the gradient
// [N, d_S] ([0, d_S] without). Rows of `gram_from` spans and more take the Gram form; none do where it is negative.
// See reference.span_pairs.
std::tuple<Tensor, Tensor, Tensor> span_pairs(const Tensor& student, const Tensor& teacher, const Tensor& weights,
                                              const Tensor& student_norm, const Tensor& teacher_norm,
                                              const Tensor& span_splits, int64_t gram_from, bool with_gradient) {
  Matrix s("student", student), t("teacher", teacher);
  check_size("teacher", "spans, as in student", s.rows, t.rows);
  for (auto [name, tensor] : {std::pair("weights", &weights), std::pair("student_norm", &student_norm),
                              std::pair("teacher_norm", &teacher_norm)}) {
    check_float(name, *tensor, 1);
    check_size(name, "spans, as in student", s.rows, tensor->size(0));
  }
  Index splits("span_splits", span_splits, 1);
  splits.check_splits(s.rows);
  MTA_CHECK(gram_from >= -1, "gram_from", "a number of spans, or -1 for none", gram_from);
  const ScalarType dtype = compute_dtype({s.dtype, t.dtype});
  const int64_t num_rows = splits.size() - 1;
  Tensor numerator = make_empty("span_splits", {num_rows}, dtype);
  Tensor denominator = make_empty("span_splits", {num_rows}, dtype);
  Tensor gradient = make_empty("student", {with_gradient ? s.rows : 0, s.cols}, dtype);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    run_rows<T>(s, t, weights, student_norm, teacher_norm, splits, gram_from, data<T>(numerator), data<T>(denominator),
                with_gradient ? data<T>(gradient) : nullptr);
  });
  return {numerator, denominator, gradient};
}

// gradient [N, d_S] times grad [B] of each span's row -> [N, d_S] in `dtype`; see reference.span_pairs_gradient.
Tensor span_pairs_gradient(const Tensor& gradient, const Tensor& grad, const Tensor& span_rows, ScalarType dtype) {
  constexpr int64_t kSpansPerTask = 64;
  Matrix rows("gradient", gradient);
  check_float("grad", grad, 1);
  Index row("span_rows", span_rows, 1);
  check_size("span_rows", "spans, as in gradient", rows.rows, row.size());
  check_floating("dtype", dtype);
  row.check_below(grad.size(0));
  Tensor out = make_empty("gradient", {rows.rows, rows.cols}, dtype);
  dispatch(compute_dtype({rows.dtype, grad.scalar_type()}), [&](auto zero) {
    using T = decltype(zero);
    const int64_t d = rows.cols, bytes = d * out.element_size();
    const Scratch<T> scale = converted<T>("grad", grad, false);
    run_tasks(ceil_div(rows.rows, kSpansPerTask), rows.rows * d, [&](int64_t task, int64_t) {
      Scratch<T> values(d), scaled(d);
      for (int64_t u = task * kSpansPerTask; u < std::min(rows.rows, (task + 1) * kSpansPerTask); ++u) {
        scale_into(rows.row<T>(u, values.get()), scale.get()[row[u]], d, dtype, scaled.get(),
                   static_cast<char*>(out.mutable_data_ptr()) + u * bytes);
      }
    });
  });
  return out;
}

}  // namespace mta_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mta_fast_cpp, m) {
  m.def(
      "span_pairs(Tensor student, Tensor teacher, Tensor weights, Tensor student_norm, Tensor teacher_norm, "
      "Tensor span_splits, int gram_from, bool with_gradient) -> (Tensor, Tensor, Tensor)");
  m.def("span_pairs_gradient(Tensor gradient, Tensor grad, Tensor span_rows, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mta_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("span_pairs", TORCH_BOX(&mta_fast::span_pairs));
  m.impl("span_pairs_gradient", TORCH_BOX(&mta_fast::span_pairs_gradient));
}
