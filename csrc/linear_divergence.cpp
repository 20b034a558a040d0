// Base losses through the LM head: mta_fast/reference.py, part 6.
//
// Positions go chunk by chunk. A chunk's logits are made tile by tile of the vocabulary, both sides, with each tile's
// part of the log-sum-exp; one pass over each row gives the value and leaves ds in place of s; then dh = ds W, a part
// for each group of tiles, and tiles of dW += ds' h. Chunks, tiles and groups do not depend on the number of threads,
// nor does the order of what is added up.

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"
#include "gemm.h"
#include "vector.h"

namespace mta_fast {

namespace {

constexpr int64_t kChunkLogits = 12 << 20;  // of each side: 48 MB of float32
constexpr int64_t kLeastChunk = 32;         // positions: fewer would read the heads too often
constexpr int64_t kTile = 1024;             // ids of a task
constexpr int64_t kGroupTiles = 4;          // of a task that makes a part of dh
constexpr int64_t kRowsPerTask = 4;         // of the pass over logits

// One model's states and LM head.
struct Side {
  Matrix hidden, weight;  // [M, d], [V, d]
  std::optional<Matrix> bias;
  double scale, softcap, temperature;
  ScalarType matmul_dtype;

  template <typename T>
  HeadOf<T> head() const {
    return {static_cast<T>(scale), static_cast<T>(softcap), static_cast<T>(temperature)};
  }
};

struct Inputs {
  Side student;
  std::optional<Side> teacher;
  std::optional<Index> labels;
  Matrix alpha, factors;  // [M]
  Kind kind;
  double beta;
  bool detach;
  int64_t vocabulary;
};

// Where the gradients go; null pointers where none is wanted, those of the head alone for a frozen one.
template <typename T>
struct Gradient {
  char* student;  // [M, d_S] in `dtype`
  ScalarType dtype;
  T* weight;  // [V_S, d_S]
  T* bias;    // [V_S]
};

// A side's chunk: its states, its logits and each tile's part of their log-sum-exp.
template <typename T>
class Logits {
 public:
  Logits(const Side& side, int64_t chunk, int64_t vocabulary)
      : side_(side),
        d_(side.hidden.cols),
        vocabulary_(vocabulary),
        tiles_(ceil_div(vocabulary, kTile)),
        as_it_is_(side.weight.is<T>() && !narrows(side.matmul_dtype)),
        states_(chunk * d_),
        logits_(chunk * vocabulary),
        parts_(chunk * tiles_ * 2),
        bias_(vocabulary) {
    for (int64_t v = 0; side.bias && v < vocabulary; ++v) bias_.get()[v] = *side.bias->row<T>(v, bias_.get() + v);
  }

  void take(int64_t first, int64_t count) {
    count_ = count;
    for (int64_t i = 0; i < count; ++i) {
      T* to = states_.get() + i * d_;
      const T* state = side_.hidden.row<T>(first + i, to);
      if (state != to) std::copy(state, state + d_, to);
      round_to(side_.matmul_dtype, to, d_);
    }
  }

  void make_tile(int64_t tile) {
    const int64_t first = tile * kTile, size = std::min(kTile, vocabulary_ - first);
    Scratch<T> copy;
    gemm(states(), weight(first, size, copy).transposed(), row(0) + first, vocabulary_);
    for (int64_t i = 0; i < count_; ++i) {
      T* logits = row(i) + first;
      head_logits(logits, side_.bias ? bias_.get() + first : nullptr, side_.head<T>(), size);
      exponential_sum(logits, size, parts_.get() + (i * tiles_ + tile) * 2);
    }
  }

  // log of the sum of exp over a row.
  T log_sum(int64_t i) const {
    const T* part = parts_.get() + i * tiles_ * 2;
    T highest = -std::numeric_limits<T>::infinity();
    for (int64_t k = 0; k < tiles_; ++k) highest = part[2 * k] > highest ? part[2 * k] : highest;
    double sum = 0;
    for (int64_t k = 0; k < tiles_; ++k) {
      sum += static_cast<double>(part[2 * k + 1]) * std::exp(static_cast<double>(part[2 * k]) - highest);
    }
    return static_cast<T>(highest + std::log(sum));
  }

  // Rows [first, first + size) of the head, rounded as its products are.
  View<T> weight(int64_t first, int64_t size, Scratch<T>& copy) const {
    int64_t stride = d_;
    if (as_it_is_) {
      const T* values = side_.weight.block<T>(first, size, nullptr, stride);
      return View<T>(values, size, d_, stride);
    }
    T* values = copy.get(size * d_);
    for (int64_t v = 0; v < size; ++v) {
      T* to = values + v * d_;
      const T* from = side_.weight.row<T>(first + v, to);
      if (from != to) std::copy(from, from + d_, to);
      round_to(side_.matmul_dtype, to, d_);
    }
    return View<T>(values, size, d_, d_);
  }

  View<T> states() { return View<T>(states_.get(0), count_, d_, d_); }
  T* row(int64_t i) { return logits_.get(0) + i * vocabulary_; }
  int64_t tiles() const { return tiles_; }

 private:
  const Side& side_;
  const int64_t d_, vocabulary_, tiles_;
  const bool as_it_is_;
  int64_t count_ = 0;
  mutable Scratch<T> states_, logits_, parts_, bias_;
};

template <typename T>
class Divergence {
 public:
  Divergence(const Inputs& in, T* values, const Gradient<T>& gradient)
      : in_(in),
        values_(values),
        gradient_(gradient),
        size_(in.student.hidden.rows),
        vocabulary_(in.vocabulary),
        chunk_(std::min(size_, std::max(kLeastChunk, kChunkLogits / vocabulary_))),
        student_(in.student, chunk_, vocabulary_) {
    if (in.teacher) teacher_.emplace(*in.teacher, chunk_, vocabulary_);
  }

  void run() {
    for (int64_t first = 0; first < size_; first += chunk_) {
      const int64_t count = std::min(chunk_, size_ - first);
      make_logits(first, count);
      const int64_t tasks = ceil_div(count, kRowsPerTask);
      run_tasks(tasks, count * vocabulary_, [&](int64_t task, int64_t) {
        for (int64_t i = task * kRowsPerTask; i < std::min(count, (task + 1) * kRowsPerTask); ++i) pass(first, i);
      });
      if (gradient_.student != nullptr) make_gradients(first, count);
    }
  }

 private:
  void make_logits(int64_t first, int64_t count) {
    student_.take(first, count);
    int64_t width = in_.student.hidden.cols;
    const int64_t own = student_.tiles(), all = own + (teacher_ ? teacher_->tiles() : 0);
    if (teacher_) {
      teacher_->take(first, count);
      width += in_.teacher->hidden.cols;
    }
    run_tasks(all, count * vocabulary_ * width, [&](int64_t task, int64_t) {
      if (task < own) {
        student_.make_tile(task);
      } else {
        teacher_->make_tile(task - own);
      }
    });
  }

  // The value of a position; ds, times its factor, in place of s.
  void pass(int64_t first, int64_t i) {
    const HeadOf<T> head = in_.student.head<T>();
    const bool write = gradient_.student != nullptr;
    T scratch;
    const T factor = *in_.factors.row<T>(first + i, &scratch) * (head.scale / head.temperature);
    T* s = student_.row(i);
    const T s_sum = student_.log_sum(i);
    if (in_.labels) {
      const int32_t label = (*in_.labels)[first + i];
      const T cap = head.softcap > 0 ? head.temperature / head.softcap : T(0);
      const T at_label = s[label];
      values_[first + i] = s_sum - at_label;
      if (!write) return;
      exponentials_into(s, s_sum, cap, factor, vocabulary_);
      s[label] -= factor * (1 - cap * at_label * (cap * at_label));
      return;
    }
    const T share = in_.kind == Kind::kJsd ? static_cast<T>(in_.beta) : *in_.alpha.row<T>(first + i, &scratch);
    double found[2];
    T* t = teacher_->row(i);
    divergence_terms(in_.kind, in_.detach, share, s_sum, teacher_->log_sum(i), head, write, s, t, vocabulary_, found);
    values_[first + i] = static_cast<T>(found[0]);
    if (write) subtract_share(s, t, static_cast<T>(found[1]), factor, vocabulary_);
  }

  void make_gradients(int64_t first, int64_t count) {
    const int64_t groups = ceil_div(student_.tiles(), kGroupTiles), d = in_.student.hidden.cols;
    const int64_t tiles = gradient_.weight != nullptr ? student_.tiles() : 0;
    T* parts = parts_.get(groups * count * d);
    run_tasks(groups + tiles, 2 * count * vocabulary_ * d, [&](int64_t task, int64_t) {
      if (task < groups) {
        make_states_part(task, count, parts + task * count * d);
      } else {
        add_head_gradient(first == 0, task - groups, count);
      }
    });
    run_tasks(count, groups * count * d, [&](int64_t i, int64_t) { write_states_gradient(first, i, count, groups); });
  }

  // ds W over the ids of a group of tiles.
  void make_states_part(int64_t group, int64_t count, T* part) {
    const int64_t d = in_.student.hidden.cols, start = group * kGroupTiles * kTile;
    Scratch<T> copy;
    for (int64_t begin = start; begin < std::min(vocabulary_, start + kGroupTiles * kTile); begin += kTile) {
      const int64_t size = std::min(kTile, vocabulary_ - begin);
      const View<T> left(student_.row(0) + begin, count, size, vocabulary_);
      if (begin == start) {
        gemm(left, student_.weight(begin, size, copy), part, d);
      } else {
        gemm_add(left, student_.weight(begin, size, copy), T(1), part, d);
      }
    }
  }

  // dh of a position: the groups' parts, one after the other.
  void write_states_gradient(int64_t first, int64_t i, int64_t count, int64_t groups) {
    const int64_t d = in_.student.hidden.cols;
    T* sum = parts_.get(0) + i * d;
    for (int64_t group = 1; group < groups; ++group) add_scaled(sum, sum + group * count * d, T(1), d);
    if (gradient_.dtype == dtype_of<T>) {
      std::copy(sum, sum + d, reinterpret_cast<T*>(gradient_.student) + (first + i) * d);
    } else {
      store(sum, d, gradient_.dtype, gradient_.student + (first + i) * d * 2);  // bfloat16
    }
  }

  void add_head_gradient(bool is_first, int64_t tile, int64_t count) {
    const int64_t begin = tile * kTile, size = std::min(kTile, vocabulary_ - begin), d = in_.student.hidden.cols;
    const View<T> left = View<T>(student_.row(0) + begin, count, size, vocabulary_).transposed();
    T* out = gradient_.weight + begin * d;
    if (is_first) {
      gemm(left, student_.states(), out, d);
    } else {
      gemm_add(left, student_.states(), T(1), out, d);
    }
    if (gradient_.bias == nullptr) return;
    std::vector<double> sums(size, 0.0);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t v = 0; v < size; ++v) sums[v] += student_.row(i)[begin + v];
    }
    for (int64_t v = 0; v < size; ++v) {
      gradient_.bias[begin + v] = static_cast<T>((is_first ? 0.0 : gradient_.bias[begin + v]) + sums[v]);
    }
  }

  const Inputs& in_;
  T* values_;
  const Gradient<T> gradient_;
  const int64_t size_, vocabulary_, chunk_;
  Logits<T> student_;
  std::optional<Logits<T>> teacher_;
  Scratch<T> parts_;  // [groups, count, d] of dh
};

Side make_side(const char* name, const Tensor& hidden, const char* weight_name, const Tensor& weight,
               const char* bias_name, const std::optional<Tensor>& bias, double scale, double softcap,
               double temperature, ScalarType matmul_dtype, int64_t vocabulary) {
  Side side{Matrix(name, hidden), Matrix(weight_name, weight), std::nullopt, scale, softcap, temperature, matmul_dtype};
  MTA_CHECK(side.hidden.cols >= 1, name, "a width of at least 1", side.hidden.cols);
  check_size(weight_name, "columns, as the states have", side.hidden.cols, side.weight.cols);
  if (bias) {
    side.bias.emplace(bias_name, *bias, 1);
    check_size(bias_name, "values, as the head has rows", side.weight.rows, side.bias->rows);
  }
  MTA_CHECK(vocabulary >= 1 && vocabulary <= side.weight.rows && vocabulary <= kMostRows, "vocabulary",
            "from 1 to " + std::to_string(side.weight.rows) + " ids, as " + weight_name + " has", vocabulary);
  MTA_CHECK(temperature > 0, name, "a head with a temperature > 0", temperature);
  MTA_CHECK(softcap >= 0, name, "a head with a softcap >= 0", softcap);
  check_floating(name, matmul_dtype);
  return side;
}

}  // namespace

// States [M, d_S], head [V_S, d_S] and bias [V_S] of the student, the same of the teacher (or labels [M], int32, for
// cross-entropy), alpha and factors [M] -> values [M], and the gradients of sum_i factors_i values_i in the states
// (bfloat16 for bfloat16 ones), head and bias (empty where there is none). See reference.linear_divergence.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_divergence(
    const Tensor& student, const Tensor& student_weight, std::optional<Tensor> student_bias,
    std::optional<Tensor> teacher, std::optional<Tensor> teacher_weight, std::optional<Tensor> teacher_bias,
    std::optional<Tensor> labels, const Tensor& alpha, const Tensor& factors, int64_t kind, double beta, bool detach,
    double student_scale, double student_softcap, double student_temperature, double teacher_scale,
    double teacher_softcap, double teacher_temperature, int64_t vocabulary, ScalarType matmul_dtype,
    ScalarType teacher_matmul_dtype, bool with_gradient, bool with_head) {
  MTA_CHECK(kind >= 0 && kind <= static_cast<int64_t>(Kind::kCrossEntropy), "kind", "a divergence from 0 to 5", kind);
  const bool reads_teacher = static_cast<Kind>(kind) != Kind::kCrossEntropy;
  MTA_CHECK(reads_teacher == (teacher.has_value() && teacher_weight.has_value()) && reads_teacher != labels.has_value(),
            "teacher", "states and a head, or labels for cross-entropy", "others");
  Inputs in{make_side("student", student, "student_weight", student_weight, "student_bias", student_bias, student_scale,
                      student_softcap, student_temperature, matmul_dtype, vocabulary),
            std::nullopt,
            std::nullopt,
            Matrix("alpha", alpha, 1),
            Matrix("factors", factors, 1),
            static_cast<Kind>(kind),
            beta,
            detach,
            vocabulary};
  const int64_t size = in.student.hidden.rows, d = in.student.hidden.cols;
  check_size("alpha", "values, one for each position", size, in.alpha.rows);
  check_size("factors", "values, one for each position", size, in.factors.rows);
  MTA_CHECK(beta > 0 && beta < 1, "beta", "a number between 0 and 1", beta);
  ScalarType dtype = compute_dtype({in.student.hidden.dtype, in.student.weight.dtype});
  if (reads_teacher) {
    in.teacher.emplace(make_side("teacher", *teacher, "teacher_weight", *teacher_weight, "teacher_bias", teacher_bias,
                                 teacher_scale, teacher_softcap, teacher_temperature, teacher_matmul_dtype,
                                 vocabulary));
    check_size("teacher", "positions, as in student", size, in.teacher->hidden.rows);
    dtype = compute_dtype({dtype, in.teacher->hidden.dtype, in.teacher->weight.dtype});
  } else {
    in.labels.emplace("labels", *labels, 1);
    check_size("labels", "values, one for each position", size, in.labels->size());
    in.labels->check_below(vocabulary);
  }
  const ScalarType kept = in.student.hidden.dtype == ScalarType::BFloat16 ? ScalarType::BFloat16 : dtype;
  const int64_t rows = with_gradient ? size : 0, ids = with_gradient && with_head ? in.student.weight.rows : 0;
  Tensor values = make_empty("student", {size}, dtype), states = make_empty("student", {rows, d}, kept);
  Tensor weight = make_empty("student_weight", {ids, d}, dtype);
  Tensor bias = make_empty("student_bias", {student_bias ? ids : 0}, dtype);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    Gradient<T> gradient{nullptr, kept, nullptr, nullptr};
    if (with_gradient) {
      gradient.student = static_cast<char*>(states.mutable_data_ptr());
    }
    if (ids > 0) {
      gradient.weight = data<T>(weight);
      if (student_bias) gradient.bias = data<T>(bias);
      const int64_t written = size > 0 ? vocabulary : 0;  // ids beyond the vocabulary have no gradient
      std::fill(gradient.weight + written * d, gradient.weight + ids * d, T(0));
      if (gradient.bias != nullptr) std::fill(gradient.bias + written, gradient.bias + ids, T(0));
    }
    if (size > 0) Divergence<T>(in, data<T>(values), gradient).run();
  });
  return {values, states, weight, bias};
}

}  // namespace mta_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mta_fast_cpp, m) {
  m.def(
      "linear_divergence(Tensor student, Tensor student_weight, Tensor? student_bias, Tensor? teacher, "
      "Tensor? teacher_weight, Tensor? teacher_bias, Tensor? labels, Tensor alpha, Tensor factors, int kind, "
      "float beta, bool detach, float student_scale, float student_softcap, float student_temperature, "
      "float teacher_scale, float teacher_softcap, float teacher_temperature, int vocabulary, "
      "ScalarType matmul_dtype, ScalarType teacher_matmul_dtype, bool with_gradient, bool with_head) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mta_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("linear_divergence", TORCH_BOX(&mta_fast::linear_divergence));
}
