// Span pooling: mta_fast/reference.py, parts 2 and 3. Bound by memory: each state is read once, each result written
// once.

#include <tuple>

#include "common.h"
#include "vector.h"

namespace mta_fast {

namespace {

constexpr int64_t kRowsPerTask = 64;  // spans, or tokens of the gradient

// weight / total in float64, where neither a sum of float32 weights nor a quotient of subnormal ones leaves its range;
// 0 of 0.
double share(double weight, double total) { return total == 0 ? 0.0 : weight / total; }

template <typename T>
void weigh_row(const Values<T>& values, const Index& ranges, const Index& covered, const Index& cover_splits,
               int64_t first_covered, int64_t last_covered, int64_t first_span, int64_t last_span, T* token, T* span,
               T* row_total) {
  double total = 0;
  for (int64_t c = first_covered; c < last_covered; ++c) {
    total += (cover_splits[c + 1] - cover_splits[c]) * static_cast<double>(values[covered[c]]);
  }
  const int64_t begin = first_covered < last_covered ? covered[first_covered] : 0;
  const int64_t end = first_covered < last_covered ? covered[last_covered - 1] + 1 : 0;
  Scratch<double> weights(end - begin);  // 0 between the covered tokens
  std::fill(weights.get(), weights.get() + (end - begin), 0.0);
  for (int64_t c = first_covered; c < last_covered; ++c) {
    const double weight = share(values[covered[c]], total);
    weights.get()[covered[c] - begin] = weight;
    token[covered[c]] = static_cast<T>(weight);
  }
  for (int64_t u = first_span; u < last_span; ++u) {
    double sum = 0;
    for (int64_t j = std::max<int64_t>(ranges[2 * u], begin); j < std::min<int64_t>(ranges[2 * u + 1], end); ++j) {
      sum += weights.get()[j - begin];
    }
    span[u] = static_cast<T>(sum);
  }
  *row_total = static_cast<T>(total);
}

template <typename T>
void weigh(const Tensor& values, const Index& ranges, const Index& span_splits, const Index& covered,
           const Index& covered_splits, const Index& cover_splits, Tensor& token, Tensor& span, Tensor& total) {
  Values<T> given("values", values);
  run_tasks(total.numel(), covered.size() + ranges.size(), [&](int64_t b, int64_t) {
    weigh_row<T>(given, ranges, covered, cover_splits, covered_splits[b], covered_splits[b + 1], span_splits[b],
                 span_splits[b + 1], data<T>(token), data<T>(span), data<T>(total) + b);
  });
}

template <typename T>
void pool(const Matrix& hidden, const Tensor& weights, const Index& ranges, Tensor& pooled, Tensor& span_weight,
          Tensor& norms) {
  Values<double> weight("weights", weights);
  const int64_t spans = ranges.size(), d = hidden.cols;
  run_tasks(ceil_div(spans, kRowsPerTask), spans * d, [&](int64_t task, int64_t) {
    Scratch<T> state(d);
    for (int64_t u = task * kRowsPerTask; u < std::min(spans, (task + 1) * kRowsPerTask); ++u) {
      const int64_t first = ranges[2 * u], last = ranges[2 * u + 1];
      double total = 0;
      for (int64_t j = first; j < last; ++j) total += weight[j];
      T* out = data<T>(pooled) + u * d;
      if (first == last) std::fill(out, out + d, T(0));
      for (int64_t j = first; j < last; ++j) {
        const T *from = hidden.row<T>(j, state.get()), factor = static_cast<T>(share(weight[j], total));
        j == first ? scale_to(out, from, factor, d) : add_scaled(out, from, factor, d);
      }
      data<double>(span_weight)[u] = total;
      data<T>(norms)[u] = norm(out, d);
    }
  });
}

template <typename T>
void pool_gradient(const Matrix& grad, const Tensor& span_weight, const Tensor& weights, const Index& token_splits,
                   const Index& cover_spans, ScalarType dtype, Tensor& out) {
  Values<double> total("span_weight", span_weight), weight("weights", weights);
  const int64_t tokens = weight.size(), d = grad.cols;
  const size_t width = static_cast<size_t>(d) * out.element_size();
  run_tasks(ceil_div(tokens, kRowsPerTask), tokens * d, [&](int64_t task, int64_t) {
    Scratch<T> sum(d), row(d);
    for (int64_t j = task * kRowsPerTask; j < std::min(tokens, (task + 1) * kRowsPerTask); ++j) {
      char* to = static_cast<char*>(out.mutable_data_ptr()) + j * width;
      T* sums = dtype == dtype_of<T> ? reinterpret_cast<T*>(to) : sum.get();
      if (token_splits[j] == token_splits[j + 1]) std::fill(sums, sums + d, T(0));
      for (int64_t i = token_splits[j]; i < token_splits[j + 1]; ++i) {
        const int64_t u = cover_spans[i];
        const T *from = grad.row<T>(u, row.get()), factor = static_cast<T>(share(weight[j], total[u]));
        i == token_splits[j] ? scale_to(sums, from, factor, d) : add_scaled(sums, from, factor, d);
      }
      if (sums == sum.get()) store(sums, d, dtype, to);
    }
  });
}

}  // namespace

// values [T] and the spans' index tensors -> w [T], W [N], row totals [B]; see reference.span_weights.
std::tuple<Tensor, Tensor, Tensor> span_weights(const Tensor& values, const Tensor& ranges, const Tensor& span_splits,
                                                const Tensor& covered, const Tensor& covered_splits,
                                                const Tensor& cover_splits) {
  check_float("values", values, 1);
  Index range("ranges", ranges, 2), splits("span_splits", span_splits, 1), tokens("covered", covered, 1);
  Index token_splits("covered_splits", covered_splits, 1), counts("cover_splits", cover_splits, 1);
  range.check_ranges(values.size(0));
  tokens.check_below(values.size(0));
  tokens.check_ascending();
  splits.check_splits(range.size());
  token_splits.check_splits(tokens.size());
  check_size("covered_splits", "bounds, as in span_splits", splits.size(), token_splits.size());
  check_size("cover_splits", "bounds", tokens.size() + 1, counts.size());
  counts.check_bounds();
  const ScalarType dtype = compute_dtype({values.scalar_type()});
  Tensor token = make_empty("values", {values.size(0)}, dtype), span = make_empty("ranges", {range.size()}, dtype);
  Tensor total = make_empty("span_splits", {splits.size() - 1}, dtype);
  torch::stable::zero_(token);
  dispatch(dtype, [&](auto zero) {
    weigh<decltype(zero)>(values, range, splits, tokens, token_splits, counts, token, span, total);
  });
  return {token, span, total};
}

// hidden [T, d], weights [T], ranges [N, 2] -> pooled [N, d], span_weight [N] (float64), norm [N]; see
// reference.pool_spans.
std::tuple<Tensor, Tensor, Tensor> pool_spans(const Tensor& hidden, const Tensor& weights, const Tensor& ranges) {
  Matrix states("hidden", hidden);
  check_float("weights", weights, 1);
  check_size("weights", "tokens, as in hidden", states.rows, weights.size(0));
  Index range("ranges", ranges, 2);
  range.check_ranges(states.rows);
  const ScalarType dtype = compute_dtype({states.dtype});
  Tensor pooled = make_empty("hidden, ranges", {range.size(), states.cols}, dtype);
  Tensor span_weight = make_empty("ranges", {range.size()}, ScalarType::Double);
  Tensor norms = make_empty("ranges", {range.size()}, dtype);
  dispatch(dtype, [&](auto zero) { pool<decltype(zero)>(states, weights, range, pooled, span_weight, norms); });
  return {pooled, span_weight, norms};
}

// grad [N, d], span_weight [N], weights [T], token_splits [T + 1], cover_spans [I] -> [T, d] in `dtype`; see
// reference.pool_spans_gradient.
Tensor pool_spans_gradient(const Tensor& grad, const Tensor& span_weight, const Tensor& weights,
                           const Tensor& token_splits, const Tensor& cover_spans, ScalarType dtype) {
  Matrix gradient("grad", grad);
  check_float("span_weight", span_weight, 1);
  check_float("weights", weights, 1);
  check_size("span_weight", "spans, as in grad", gradient.rows, span_weight.size(0));
  check_floating("dtype", dtype);
  Index splits("token_splits", token_splits, 1), spans("cover_spans", cover_spans, 1);
  check_size("token_splits", "bounds", weights.size(0) + 1, splits.size());
  splits.check_splits(spans.size());
  spans.check_below(gradient.rows);
  Tensor out = make_empty("weights, grad", {weights.size(0), gradient.cols}, dtype);
  dispatch(compute_dtype({gradient.dtype}), [&](auto zero) {
    pool_gradient<decltype(zero)>(gradient, span_weight, weights, splits, spans, dtype, out);
  });
  return out;
}

}  // namespace mta_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mta_fast_cpp, m) {
  m.def(
      "span_weights(Tensor values, Tensor ranges, Tensor span_splits, Tensor covered, Tensor covered_splits, "
      "Tensor cover_splits) -> (Tensor, Tensor, Tensor)");
  m.def("pool_spans(Tensor hidden, Tensor weights, Tensor ranges) -> (Tensor, Tensor, Tensor)");
  m.def(
      "pool_spans_gradient(Tensor grad, Tensor span_weight, Tensor weights, Tensor token_splits, Tensor cover_spans, "
      "ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mta_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("span_weights", TORCH_BOX(&mta_fast::span_weights));
  m.impl("pool_spans", TORCH_BOX(&mta_fast::pool_spans));
  m.impl("pool_spans_gradient", TORCH_BOX(&mta_fast::pool_spans_gradient));
}
