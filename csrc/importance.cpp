// Token importance: mta_fast/reference.py, part 1.
//
// Short rows hold their scores: s is symmetric, so only blocks of queries against the keys from the block on are
// multiplied, and mirrored. Longer rows go strip by strip of queries against all keys that the strip sees. Either way
// a softmax over keys and its sum over queries follow in the same memory; no row longer than kHeldTokens has its
// scores in memory at once.

#include <cmath>
#include <limits>
#include <vector>

#include "common.h"
#include "gemm.h"
#include "vector.h"

namespace mta_fast {

namespace {

constexpr double kStdEps = 1e-5;
constexpr double kLeastScale = 1e-6;       // of a token whose products may be taken before they are scaled
constexpr int64_t kHeldTokens = 1024;      // scores of a held row: 4 MB of float32
constexpr int64_t kStripScores = 1 << 21;  // scores of a strip: 8 MB of float32 for each thread
constexpr int64_t kKeyTile = 512;          // keys that are multiplied at once
constexpr int64_t kTasksPerRow = 64;       // bounds the column sums that wait to be added up
constexpr int64_t kGroupScores = 1 << 20;  // held rows are worked on in groups of at least 4 MB of scores
constexpr int64_t kGroupStates = 1 << 22;  // unless their states, where those are converted, reach 16 MB a thread
constexpr int64_t kBlocksPerThread = 8;    // and at least this many blocks, so that the threads finish together

struct Row {
  int64_t first, queries;  // flat position of query 0, and their number
  int64_t offset, keys;    // key k is query offset + k
  bool causal;

  bool symmetric() const { return !causal && queries == keys; }
  int64_t visible(int64_t query) const { return causal ? std::clamp<int64_t>(query - offset, 0, keys) : keys; }
};

// A block of queries of one row.
struct Block {
  int64_t row, begin, end;
};

// 1 / ((std + eps) d^(1/4)) of `count` tokens: the scores are the products of the states, times two of these.
template <typename T>
void token_scales(const Matrix& hidden, int64_t first, int64_t count, T* scratch, T* scale) {
  const T width = std::sqrt(std::sqrt(static_cast<T>(hidden.cols)));
  for (int64_t i = 0; i < count; ++i) {
    T std = centred_norm(hidden.row<T>(first + i, scratch), hidden.cols) / std::sqrt(static_cast<T>(hidden.cols - 1));
    scale[i] = 1 / ((std + static_cast<T>(kStdEps)) * width);
  }
}

// Whether products of the states can be taken before they are scaled. A state of small scale is a large one: its
// products could overflow where its scores do not. With larger scales, scores would be beyond 1e26.
template <typename T>
bool products_fit(const Matrix& hidden, const T* scale, int64_t count) {
  return scales_later(hidden, scale, count) &&
         std::all_of(scale, scale + count, [](T s) { return s >= static_cast<T>(kLeastScale); });
}

// One query's scores [keys] to its softmax, which is added to `columns`. `own` is the query's own key, if any.
template <typename T>
void attend(T* scores, int64_t keys, int64_t own, T* columns) {
  if (keys == 0) return;                                                          // an empty softmax adds 0
  if (own >= 0 && own < keys) scores[own] = -std::numeric_limits<T>::infinity();  // no self-loop
  T sum = softmax_terms(scores, keys);
  add_scaled(columns, scores, 1 / sum, keys);
}

// importance [keys] = sum of the partial column sums [partials, keys] / queries.
template <typename T>
void mean_over_queries(const T* partials, int64_t count, const Row& row, T* importance) {
  for (int64_t k = 0; k < row.keys; ++k) {
    double sum = 0;
    for (int64_t p = 0; p < count; ++p) sum += partials[p * row.keys + k];
    importance[k] = static_cast<T>(sum / static_cast<double>(row.queries));
  }
}

// --- rows that hold their scores ---

int64_t block_of(int64_t tokens) { return tokens <= 256 ? 64 : 128; }

template <typename T>
class HeldRows {
 public:
  HeldRows(const Matrix& hidden, T* importance) : hidden_(hidden), importance_(importance) {}

  void add(const Row& row) {
    for (int64_t q = 0; q < row.keys; q += block_of(row.keys)) {
      blocks_.push_back({static_cast<int64_t>(rows_.size()), q, std::min(q + block_of(row.keys), row.keys)});
    }
    rows_.push_back({row, num_tokens_, num_scores_, num_partials_});
    num_tokens_ += row.keys;
    num_scores_ += row.keys * row.keys;
    num_partials_ += ceil_div(row.keys, block_of(row.keys)) * row.keys;
  }

  bool enough() const {
    if (!hidden_.is<T>() && num_tokens_ * hidden_.cols > kGroupStates * num_threads()) return true;
    return num_scores_ >= kGroupScores && static_cast<int64_t>(blocks_.size()) >= kBlocksPerThread * num_threads();
  }

  // Works on the rows that were added and forgets them.
  void run() {
    scales_.get(num_tokens_);
    scores_.get(num_scores_);
    partials_.get(num_partials_);
    const int64_t d = hidden_.cols;
    auto each_block = [&](int64_t work, auto step) {
      run_tasks(blocks_.size(), work, [&](int64_t task, int64_t) { step(blocks_[task], rows_[blocks_[task].row]); });
    };
    each_block(num_tokens_ * d, [&](const Block& block, const Held& held) { scale(block, held); });
    prepare();
    each_block(num_scores_ * d, [&](const Block& block, const Held& held) { multiply_block(block, held); });
    each_block(num_scores_, [&](const Block& block, const Held& held) { attend_block(block, held); });
    run_tasks(rows_.size(), num_partials_, [&](int64_t task, int64_t) {
      const Held& held = rows_[task];
      mean_over_queries(partials_.get() + held.partials, ceil_div(held.row.keys, block_of(held.row.keys)), held.row,
                        importance_ + held.row.first);
    });
    blocks_.clear();
    rows_.clear();
    num_tokens_ = num_scores_ = num_partials_ = 0;
  }

 private:
  struct Held {
    Row row;
    int64_t tokens, scores, partials;  // where its part begins in scales_ (and copies_), scores_, partials_
    ScaledRows<T> states{};
  };

  void scale(const Block& block, const Held& held) {
    Scratch<T> state(hidden_.cols);
    token_scales(hidden_, held.row.first + block.begin, block.end - block.begin, state.get(),
                 scales_.get() + held.tokens + block.begin);
  }

  // The states of every row, copied where they can't be multiplied as they are.
  void prepare() {
    std::vector<char> later(rows_.size());
    int64_t copied = 0;
    for (size_t r = 0; r < rows_.size(); ++r) {
      later[r] = products_fit(hidden_, scales_.get() + rows_[r].tokens, rows_[r].row.keys);
      copied += later[r] ? 0 : rows_[r].row.keys * hidden_.cols;
    }
    if (copied > 0) copies_.get(num_tokens_ * hidden_.cols);
    run_tasks(rows_.size(), copied, [&](int64_t r, int64_t) {
      Held& held = rows_[r];
      held.states = scaled_rows(hidden_, held.row.first, held.row.keys, scales_.get() + held.tokens, later[r] != 0,
                                later[r] ? nullptr : copies_.get() + held.tokens * hidden_.cols);
    });
  }

  // Scores of the block's queries against the keys from the block on, and the same below the diagonal.
  void multiply_block(const Block& block, const Held& held) {
    const auto& [values, stride, factors] = held.states;
    const int64_t n = held.row.keys, width = n - block.begin;
    T* scores = scores_.get() + held.scores;
    gemm(View<T>(values + block.begin * stride, block.end - block.begin, hidden_.cols, stride),
         View<T>(values + block.begin * stride, width, hidden_.cols, stride).transposed(),
         scores + block.begin * n + block.begin, n);
    if (factors != nullptr) {
      for (int64_t q = block.begin; q < block.end; ++q) {
        multiply(scores + q * n + block.begin, factors + block.begin, factors[q], width);
      }
    }
    for (int64_t k = block.end; k < n; ++k) {
      for (int64_t q = block.begin; q < block.end; ++q) scores[k * n + q] = scores[q * n + k];
    }
  }

  void attend_block(const Block& block, const Held& held) {
    const int64_t n = held.row.keys;
    T* scores = scores_.get() + held.scores;
    T* columns = partials_.get() + held.partials + block.begin / block_of(n) * n;
    std::fill(columns, columns + n, T(0));
    for (int64_t q = block.begin; q < block.end; ++q) attend(scores + q * n, n, q, columns);
  }

  const Matrix& hidden_;
  T* importance_;
  std::vector<Held> rows_;
  std::vector<Block> blocks_;
  int64_t num_tokens_ = 0, num_scores_ = 0, num_partials_ = 0;
  Scratch<T> scales_, copies_, scores_, partials_;
};

// --- rows that go strip by strip ---

template <typename T>
class StripRow {
 public:
  StripRow(const Matrix& hidden, const Row& row)
      : hidden_(hidden),
        row_(row),
        strip_(std::clamp<int64_t>(kStripScores / row.keys / 32 * 32, 32, row.keys < 4 * kHeldTokens ? 128 : 256)),
        scales_(row.queries) {}

  void run(T* importance) {
    const int64_t d = hidden_.cols;
    run_tasks(ceil_div(row_.queries, kKeyTile), row_.queries * d, [&](int64_t task, int64_t) {
      Scratch<T> state(d);
      const int64_t begin = task * kKeyTile, count = std::min(kKeyTile, row_.queries - begin);
      token_scales(hidden_, row_.first + begin, count, state.get(), scales_.get() + begin);
    });
    later_ = products_fit(hidden_, scales_.get(), row_.queries);
    const int64_t strips = ceil_div(row_.queries, strip_), per_task = ceil_div(strips, kTasksPerRow);
    const int64_t tasks = ceil_div(strips, per_task);
    Scratch<T> partials(tasks * row_.keys);
    std::vector<Workspace> workspaces(std::max<int64_t>(num_threads(), 2));
    run_tasks(tasks, row_.queries * row_.keys * d, [&](int64_t task, int64_t thread) {
      T* columns = partials.get() + task * row_.keys;
      std::fill(columns, columns + row_.keys, T(0));
      for (int64_t s = task * per_task; s < std::min(strips, (task + 1) * per_task); ++s) {
        attend_strip(s * strip_, std::min(row_.queries, (s + 1) * strip_), columns, workspaces[thread]);
      }
    });
    mean_over_queries(partials.get(), tasks, row_, importance + row_.first + row_.offset);
  }

 private:
  struct Workspace {
    Scratch<T> scores, queries, keys;
  };

  void attend_strip(int64_t begin, int64_t end, T* columns, Workspace& work) {
    const int64_t d = hidden_.cols, count = end - begin, seen = row_.visible(end - 1);
    if (seen == 0) return;
    const T* scales = scales_.get();
    T* scores = work.scores.get(count * seen);
    auto states = [&](int64_t query, int64_t number, Scratch<T>& copies) {
      return scaled_rows(hidden_, row_.first + query, number, scales + query, later_,
                         later_ ? nullptr : copies.get(number * d));
    };
    const ScaledRows<T> queries = states(begin, count, work.queries);
    for (int64_t key = 0; key < seen; key += kKeyTile) {
      const int64_t width = std::min(kKeyTile, seen - key);
      const ScaledRows<T> keys = states(row_.offset + key, width, work.keys);
      gemm(View<T>(queries.values, count, d, queries.stride), View<T>(keys.values, width, d, keys.stride).transposed(),
           scores + key, seen);
    }
    for (int64_t query = begin; query < end; ++query) {
      T* line = scores + (query - begin) * seen;
      const int64_t visible = row_.visible(query);
      if (later_) multiply(line, scales + row_.offset, scales[query], visible);
      attend(line, visible, query - row_.offset, columns);
    }
  }

  const Matrix& hidden_;
  const Row row_;
  const int64_t strip_;
  bool later_ = false;
  Scratch<T> scales_;
};

template <typename T>
void run_rows(const Matrix& hidden, const std::vector<Row>& rows, T* importance) {
  HeldRows<T> held(hidden, importance);
  bool waiting = false;
  for (const Row& row : rows) {
    if (row.keys == 0) continue;
    if (row.keys == 1) {
      importance[row.first + row.offset] = 1;
    } else if (row.symmetric() && row.keys <= kHeldTokens) {
      held.add(row);
      waiting = !held.enough();
      if (!waiting) held.run();
    } else {
      StripRow<T>(hidden, row).run(importance);
    }
  }
  if (waiting) held.run();
}

}  // namespace

// hidden [T, d], rows_host [B, 2] (start, length) -> [T] in the compute dtype; see reference.token_importance.
Tensor token_importance(const Tensor& hidden, const Tensor& rows_host, int64_t seq_len, bool causal,
                        bool count_padding) {
  Matrix states("hidden", hidden);
  MTA_CHECK(states.cols >= 2, "hidden", "a width of at least 2", states.cols);
  Index table("rows_host", rows_host, 2);
  table.check_columns(2);
  MTA_CHECK(seq_len >= 0 && seq_len <= kMostRows, "seq_len", "positions of a row, 0 to 2^31 - 1", seq_len);
  std::vector<Row> rows;
  int64_t last = 0;
  for (int64_t b = 0; b < table.size(); ++b) {
    const int64_t start = table[2 * b], length = table[2 * b + 1], first = count_padding ? b * seq_len : start;
    const int64_t queries = count_padding ? seq_len : length;
    MTA_CHECK(length >= 0 && first >= 0 && start >= first && start + length <= first + queries &&
                  first + queries <= states.rows,
              "rows_host", "rows within the tokens", "row ", b, " from ", start, " of length ", length);
    MTA_CHECK(length == 0 || start >= last, "rows_host", "rows that ascend and don't overlap", "row ", b, " from ",
              start);
    last = std::max(last, start + length);
    rows.push_back({first, queries, start - first, length, causal});
  }
  const ScalarType dtype = compute_dtype({states.dtype});
  Tensor importance = make_empty("hidden", {states.rows}, dtype);
  torch::stable::zero_(importance);
  dispatch(dtype, [&](auto zero) { run_rows(states, rows, data<decltype(zero)>(importance)); });
  return importance;
}

}  // namespace mta_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mta_fast_cpp, m) {
  m.def("token_importance(Tensor hidden, Tensor rows_host, int seq_len, bool causal, bool count_padding) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mta_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("token_importance", TORCH_BOX(&mta_fast::token_importance));
}
