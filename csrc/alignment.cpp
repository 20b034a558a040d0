// Character spans to token ranges, and token ranges to the index tensors of a SpanBatch: mta_fast/spans/align.py in
// C++. One thread and no vendor library: it runs in data loader workers, which are forked. Every op is linear where
// spans ascend.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common.h"

namespace mta_fast {

namespace {

// A contiguous tensor of one integer dtype on the CPU, checked: [rows] or [rows, cols].
template <typename T>
class Table {
 public:
  Table(const char* name, const Tensor& tensor, ScalarType dtype, int64_t cols = 0) : name_(name), owner_(tensor) {
    check_cpu(name, tensor);
    const ScalarType got = dtype_of_tensor(tensor);
    MTA_CHECK(got == dtype, name, dtype_name(dtype), dtype_name(got));
    int64_t dim = cols == 0 ? 1 : 2;
    MTA_CHECK(tensor.dim() == dim, name, std::to_string(dim) + " dimensions", tensor.dim());
    if (cols != 0) check_size(name, "columns", cols, tensor.size(1));
    MTA_CHECK(tensor.is_contiguous(), name, "a contiguous tensor", "a strided one");
    data_ = data<T>(std::as_const(owner_));
    size = tensor.size(0);
    MTA_CHECK(size <= kMostRows, name, "fewer than 2^31 rows", size);
  }
  T operator[](int64_t i) const { return data_[i]; }
  void check_size_is(int64_t expected) const { check_size(name_, "rows", expected, size); }
  // Values never decrease and are in [0, bound).
  void check_ascending(int64_t bound) const {
    for (int64_t i = 0; i < size; ++i) {
      MTA_CHECK(data_[i] >= (i == 0 ? 0 : data_[i - 1]) && data_[i] < bound, name_,
                "ascending values from 0 to " + std::to_string(bound - 1), data_[i]);
    }
  }

  int64_t size;

 private:
  const char* name_;
  Tensor owner_;
  const T* data_;
};

using Integers = Table<int64_t>;

// (start, length) of each row on the flat token axis: ascending, apart, within `tokens`.
void check_rows(const Integers& rows, int64_t tokens) {
  int64_t last = 0;
  for (int64_t b = 0; b < rows.size; ++b) {
    int64_t start = rows[2 * b], length = rows[2 * b + 1];
    MTA_CHECK(start >= last && length >= 0 && start <= tokens && length <= tokens - start, "rows",
              "ascending rows within " + std::to_string(tokens) + " tokens", "(", start, ", ", length, ") in row ", b);
    last = start + length;
  }
}

// The texts of the rows: code points of all, where each begins, and which code points are white space.
struct Texts {
  Texts(const std::optional<Tensor>& characters, const std::optional<Tensor>& splits,
        const std::optional<Tensor>& spaces, int64_t rows) {
    MTA_CHECK(characters.has_value() == splits.has_value() && characters.has_value() == spaces.has_value(), "texts",
              "characters, their splits and a table of white space", "some of them");
    if (!characters.has_value()) return;
    characters_.emplace("characters", *characters, ScalarType::Int);
    splits_.emplace("text_splits", *splits, ScalarType::Long);
    spaces_.emplace("spaces", *spaces, ScalarType::Bool);
    splits_->check_size_is(rows + 1);
    splits_->check_ascending(characters_->size + 1);
  }

  // Whether the character before a span is forgiven where a token begins with it: any without texts, else white space.
  bool forgives(int64_t row, int64_t position) const {
    if (!characters_.has_value()) return true;
    int64_t first = (*splits_)[row];
    if (position < 0 || position >= (*splits_)[row + 1] - first) return false;
    int64_t code = (*characters_)[first + position];
    return code >= 0 && code < spaces_->size && (*spaces_)[code];
  }

 private:
  std::optional<Table<int32_t>> characters_;
  std::optional<Integers> splits_;
  std::optional<Table<uint8_t>> spaces_;
};

// The tokens of a row that can belong to a span, in order.
struct Tokens {
  std::vector<int64_t> index, forgiven, end;

  // False where the offsets decrease or are negative.
  bool read(const Integers& offsets, const Texts& texts, int64_t row, int64_t start, int64_t length) {
    index.clear(), forgiven.clear(), end.clear();
    int64_t last_start = 0, last_end = 0;
    for (int64_t token = start; token < start + length; ++token) {
      int64_t s = offsets[2 * token], t = offsets[2 * token + 1];
      if (t <= s) continue;  // of zero width
      if (s < last_start || t < last_end) return false;
      last_start = s, last_end = t;
      index.push_back(token);
      forgiven.push_back(s + texts.forgives(row, s));  // s < t: no overflow
      end.push_back(t);
    }
    return true;
  }
};

// How many of the ascending values come before the bound, for which `is_before` holds. Looked for from the last
// answer on, by doubling steps: spans mostly ascend.
template <typename IsBefore>
int64_t count_before(const std::vector<int64_t>& values, int64_t last, IsBefore is_before) {
  auto begin = values.begin();
  if (last > 0 && !is_before(values[last - 1])) return std::partition_point(begin, begin + last, is_before) - begin;
  int64_t size = static_cast<int64_t>(values.size()), step = 1;
  while (step <= size - last && is_before(values[last + step - 1])) last += step, step *= 2;
  return std::partition_point(begin + last, begin + std::min(last + step, size), is_before) - begin;
}

Tensor make_index(int64_t size) { return make_empty("ranges, offsets", {size}, ScalarType::Int); }

}  // namespace

// Token j with offsets [s, t) belongs to the span [c, e) when s + 1 >= c (s >= c where texts don't forgive) and t <= e.
// offsets [T, 2], rows [B, 2] (start, length), span_rows [N] ascending, char_spans [N, 2] -> ranges [N, 2] flat, 0 and
// 0 where no token belongs; cut [N], the span ends beyond the last token; the first row with bad offsets, or -1.
std::tuple<Tensor, Tensor, int64_t> token_ranges(const Tensor& offsets, const Tensor& rows, const Tensor& span_rows,
                                                 const Tensor& char_spans, const std::optional<Tensor>& characters,
                                                 const std::optional<Tensor>& text_splits,
                                                 const std::optional<Tensor>& spaces) {
  Integers o("offsets", offsets, ScalarType::Long, 2), r("rows", rows, ScalarType::Long, 2);
  Integers span_row("span_rows", span_rows, ScalarType::Long), spans("char_spans", char_spans, ScalarType::Long, 2);
  Texts texts(characters, text_splits, spaces, r.size);
  check_rows(r, o.size);
  spans.check_size_is(span_row.size);
  span_row.check_ascending(r.size);

  for (int64_t u = 0; u < spans.size; ++u) {
    MTA_CHECK(0 <= spans[2 * u] && spans[2 * u] <= spans[2 * u + 1], "char_spans", "0 <= start <= end", "(",
              spans[2 * u], ", ", spans[2 * u + 1], ") in row ", u);
  }

  Tensor ranges = make_empty("char_spans", {spans.size, 2}, ScalarType::Long);
  Tensor cut = make_empty("char_spans", {spans.size}, ScalarType::Bool);
  int64_t* range = data<int64_t>(ranges);
  bool* is_cut = data<bool>(cut);
  Tokens tokens;
  for (int64_t b = 0, u = 0; b < r.size; ++b) {
    if (!tokens.read(o, texts, b, r[2 * b], r[2 * b + 1])) {
      torch::stable::zero_(ranges), torch::stable::zero_(cut);
      return {ranges, cut, b};
    }
    int64_t last_end = tokens.end.empty() ? 0 : tokens.end.back();
    for (int64_t first = 0, last = 0; u < spans.size && span_row[u] == b; ++u) {
      int64_t start = spans[2 * u], end = spans[2 * u + 1];
      first = count_before(tokens.forgiven, first, [&](int64_t forgiven) { return forgiven < start; });
      last = count_before(tokens.end, last, [&](int64_t token_end) { return token_end <= end; });
      range[2 * u] = last > first ? tokens.index[first] : 0;
      range[2 * u + 1] = last > first ? tokens.index[last - 1] + 1 : 0;
      is_cut[u] = end > last_end;
    }
  }
  return {ranges, cut, -1};
}

namespace {

// What span_index reads: spans [N] row after row, as token ranges within their row, and the tokens of all rows.
struct Spans {
  Spans(const Tensor& span_rows, const Tensor& token_ranges, const Tensor& token_offsets, const Tensor& row_table)
      : row("span_rows", span_rows, ScalarType::Long),
        ranges("ranges", token_ranges, ScalarType::Long, 2),
        offsets("offsets", token_offsets, ScalarType::Long, 2),
        rows("rows", row_table, ScalarType::Long, 2) {
    check_rows(rows, offsets.size);
    ranges.check_size_is(row.size);
    row.check_ascending(rows.size);
    int64_t total = 0;
    for (int64_t u = 0; u < ranges.size; ++u) {
      MTA_CHECK(rows[2 * row[u]] <= start(u) && start(u) <= end(u) && end(u) <= row_end(row[u]), "ranges",
                "token ranges within their row", "(", start(u), ", ", end(u), ")");
      total += end(u) - start(u);
      MTA_CHECK(total <= kMostRows, "ranges", "fewer than 2^31 tokens in all spans", "more");
    }
  }
  int64_t start(int64_t u) const { return ranges[2 * u]; }
  int64_t end(int64_t u) const { return ranges[2 * u + 1]; }
  int64_t row_end(int64_t b) const { return rows[2 * b] + rows[2 * b + 1]; }
  bool has_width(int64_t token) const { return offsets[2 * token + 1] > offsets[2 * token]; }

  Integers row, ranges, offsets, rows;
};

// ranges, span_rows, span_splits and host.
std::tuple<Tensor, Tensor, Tensor, Tensor> by_span(const Spans& spans) {
  int64_t count = spans.ranges.size, rows = spans.rows.size;
  Tensor ranges = make_empty("ranges", {count, 2}, ScalarType::Int), span_rows = make_index(count);
  Tensor span_splits = make_index(rows + 1), host = make_empty("rows", {rows + 1, 2}, ScalarType::Int);
  int32_t *range = data<int32_t>(ranges), *row = data<int32_t>(span_rows);
  int32_t *splits = data<int32_t>(span_splits), *table = data<int32_t>(host);
  int32_t u = 0, total = 0;
  for (int64_t b = 0; b <= rows; ++b) {
    splits[b] = table[2 * b] = u;
    table[2 * b + 1] = total;
    for (; u < count && spans.row[u] == b; ++u) {
      row[u] = static_cast<int32_t>(b);
      range[2 * u] = static_cast<int32_t>(spans.start(u));
      range[2 * u + 1] = static_cast<int32_t>(spans.end(u));
      total += range[2 * u + 1] - range[2 * u];
    }
  }
  return {ranges, span_rows, span_splits, host};
}

// covered, covered_rows, covered_splits, cover_splits and token_splits; `covers` [T] holds how many spans cover each
// token, and afterwards where each token's list begins.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> by_token(const Spans& spans, std::vector<int32_t>& covers) {
  int64_t tokens = spans.offsets.size, rows = spans.rows.size;
  int64_t count = tokens - std::count(covers.begin(), covers.end(), 0);
  Tensor covered = make_index(count), covered_rows = make_index(count), covered_splits = make_index(rows + 1);
  Tensor cover_splits = make_index(count + 1), token_splits = make_index(tokens + 1);
  int32_t *token = data<int32_t>(covered), *row = data<int32_t>(covered_rows), *splits = data<int32_t>(covered_splits);
  int32_t *lists = data<int32_t>(cover_splits), *all_lists = data<int32_t>(token_splits);
  int32_t position = 0, c = 0, b = 0;
  splits[0] = lists[0] = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    int32_t covering = covers[t];
    all_lists[t] = covers[t] = position;
    if (covering == 0) continue;
    position += covering;
    for (; t >= spans.row_end(b); ++b) splits[b + 1] = c;
    token[c] = static_cast<int32_t>(t);
    row[c] = b;
    lists[++c] = position;
  }
  all_lists[tokens] = position;
  for (; b < rows; ++b) splits[b + 1] = c;
  return {covered, covered_rows, covered_splits, cover_splits, token_splits};
}

}  // namespace

// The index tensors of a SpanBatch (see there), int32: span_rows [N] ascending, ranges [N, 2] flat, offsets [T, 2],
// rows [B, 2] -> ranges, span_rows, span_splits, covered, covered_rows, covered_splits, cover_splits, cover_spans,
// token_splits, host.
std::vector<Tensor> span_index(const Tensor& rows_of_spans, const Tensor& ranges_of_spans, const Tensor& offsets,
                               const Tensor& rows) {
  Spans spans(rows_of_spans, ranges_of_spans, offsets, rows);
  std::vector<int32_t> covers(spans.offsets.size);
  int64_t incidences = 0;
  for (int64_t u = 0; u < spans.ranges.size; ++u) {
    for (int64_t t = spans.start(u); t < spans.end(u); ++t) {
      covers[t] += spans.has_width(t);
      incidences += spans.has_width(t);
    }
  }
  auto [ranges, span_rows, span_splits, host] = by_span(spans);
  auto [covered, covered_rows, covered_splits, cover_splits, token_splits] = by_token(spans, covers);
  Tensor cover_spans = make_index(incidences);
  int32_t* list = data<int32_t>(cover_spans);
  for (int64_t u = 0; u < spans.ranges.size; ++u) {
    for (int64_t t = spans.start(u); t < spans.end(u); ++t) {
      if (spans.has_width(t)) list[covers[t]++] = static_cast<int32_t>(u);
    }
  }
  return {ranges,         span_rows,    span_splits, covered,      covered_rows,
          covered_splits, cover_splits, cover_spans, token_splits, host};
}

}  // namespace mta_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mta_fast_cpp, m) {
  m.def(
      "token_ranges(Tensor offsets, Tensor rows, Tensor span_rows, Tensor char_spans, Tensor? characters, "
      "Tensor? text_splits, Tensor? spaces) -> (Tensor, Tensor, int)");
  m.def("span_index(Tensor span_rows, Tensor ranges, Tensor offsets, Tensor rows) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(mta_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("token_ranges", TORCH_BOX(&mta_fast::token_ranges));
  m.impl("span_index", TORCH_BOX(&mta_fast::span_index));
}
