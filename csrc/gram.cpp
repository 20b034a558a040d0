// Span pairs in the centred Gram form, for rows with many spans: mta_fast/reference.py, part 4, `_gram`.
//
// X and Y are the unit rows less their weighted means m and n. The Gram matrices X'DX, Y'DX and Y'DY grow chunk by
// chunk of spans, tile by tile; of the symmetric two only the tiles on and above the diagonal. The gradient goes over
// the spans once more, block by block. The sums that cancel are float64.

#include <vector>

#include "gemm.h"
#include "span_pairs.h"
#include "vector.h"

namespace mta_fast {

namespace {

constexpr int64_t kChunk = 1024;  // spans whose X and Y are in memory: 19 MB of float32 at widths 768 and 1,600
constexpr int64_t kTile = 256;    // of a Gram matrix
constexpr int64_t kBlock = 128;   // spans of a task that goes over spans

template <typename T>
class GramRow {
 public:
  GramRow(const SpanPairs<T>& pairs, const SpanRow& row)
      : pairs_(pairs),
        row_(row),
        ds_(pairs.student.cols),
        dt_(pairs.teacher.cols),
        mean_(ds_ + dt_),
        pull_(ds_),
        offset_(row.size()),
        x_(kChunk * ds_),
        wx_(kChunk * ds_),
        y_(kChunk * dt_),
        wy_(kChunk * dt_),
        xx_(ds_ * ds_),
        yx_(dt_ * ds_),
        yy_(dt_ * dt_) {}

  T run() {
    take_means();
    Scratch<T> pulls(ceil_div(row_.size(), kBlock) * ds_);
    for (int64_t first = 0; first < row_.size(); first += kChunk) {
      const int64_t count = std::min(kChunk, row_.size() - first);
      centre_chunk(first, count, pulls.get());
      add_products(count, first == 0);
    }
    if (pairs_.gradient != nullptr) {
      add_up(pulls.get(), ceil_div(row_.size(), kBlock), ds_, 1.0, pull_.get());
      write_gradient();
    }
    return static_cast<T>(numerator());
  }

 private:
  template <typename Step>
  void each_block(int64_t first, int64_t last, int64_t work, const Step& step) {
    run_tasks(ceil_div(last - first, kBlock), work, [&](int64_t task, int64_t) {
      const int64_t begin = first + task * kBlock;
      step(begin / kBlock, begin, std::min(begin + kBlock, last));
    });
  }

  // out [width] = the sum of `count` partial sums / total.
  static void add_up(const T* partials, int64_t count, int64_t width, double total, T* out) {
    for (int64_t i = 0; i < width; ++i) {
      double sum = 0;
      for (int64_t p = 0; p < count; ++p) sum += partials[p * width + i];
      out[i] = static_cast<T>(sum / total);
    }
  }

  // m and n: the weighted means of the unit rows, one after the other in mean_.
  void take_means() {
    const int64_t width = ds_ + dt_, blocks = ceil_div(row_.size(), kBlock);
    Scratch<T> partials(blocks * width);
    each_block(0, row_.size(), row_.size() * width, [&](int64_t block, int64_t begin, int64_t end) {
      Scratch<T> state(std::max(ds_, dt_));
      T* sums = partials.get() + block * width;
      std::fill(sums, sums + width, T(0));
      for (int64_t u = row_.first + begin; u < row_.first + end; ++u) {
        const T weight = pairs_.weight[u];
        add_scaled(sums, pairs_.student.template row<T>(u, state.get()), weight * pairs_.student_scale[u], ds_);
        add_scaled(sums + ds_, pairs_.teacher.template row<T>(u, state.get()), weight * pairs_.teacher_scale[u], dt_);
      }
    });
    for (int64_t u = row_.first; u < row_.last; ++u) omega_ += pairs_.weight[u];
    add_up(partials.get(), blocks, width, omega_ == 0 ? 1.0 : omega_, mean_.get());
    const T *m = mean_.get(), *n = m + ds_;
    delta_ = wide_dot(m, m, ds_) - wide_dot(n, n, dt_);
  }

  // x and y of span `u` of the row.
  void centre_span(int64_t u, T* state, T* x, T* y) const {
    const int64_t at = row_.first + u;
    centre(x, pairs_.student.template row<T>(at, state), pairs_.student_scale[at], mean_.get(), ds_);
    centre(y, pairs_.teacher.template row<T>(at, state), pairs_.teacher_scale[at], mean_.get() + ds_, dt_);
  }

  // X, Y, DX and DY of a chunk; b of its spans; the blocks' parts of sum W b x.
  void centre_chunk(int64_t first, int64_t count, T* pulls) {
    each_block(first, first + count, count * (ds_ + dt_) * 4, [&](int64_t block, int64_t begin, int64_t end) {
      Scratch<T> state(std::max(ds_, dt_));
      std::fill(pulls + block * ds_, pulls + (block + 1) * ds_, T(0));
      for (int64_t u = begin; u < end; ++u) {
        T *x = x_.get() + (u - first) * ds_, *y = y_.get() + (u - first) * dt_;
        const T weight = pairs_.weight[row_.first + u];
        centre_span(u, state.get(), x, y);
        scale_to(wx_.get() + (u - first) * ds_, x, weight, ds_);
        scale_to(wy_.get() + (u - first) * dt_, y, weight, dt_);
        offset_.get()[u] = wide_dot(x, mean_.get(), ds_) - wide_dot(y, mean_.get() + ds_, dt_);
        add_scaled(pulls + block * ds_, x, weight * static_cast<T>(offset_.get()[u]), ds_);
      }
    });
  }

  // The chunk's part of the three Gram matrices.
  void add_products(int64_t count, bool first) {
    struct Tile {
      const T *left, *right;
      int64_t width_left, width_right, row, col;
      T* out;
    };
    std::vector<Tile> tiles;
    auto add = [&](const T* left, int64_t dl, const T* right, int64_t dr, T* out, bool symmetric) {
      for (int64_t i = 0; i < dl; i += kTile) {
        for (int64_t j = symmetric ? i : 0; j < dr; j += kTile) tiles.push_back({left, right, dl, dr, i, j, out});
      }
    };
    add(y_.get(), dt_, wy_.get(), dt_, yy_.get(), true);
    add(y_.get(), dt_, wx_.get(), ds_, yx_.get(), false);
    add(x_.get(), ds_, wx_.get(), ds_, xx_.get(), true);
    run_tasks(tiles.size(), count * (ds_ + dt_) * (ds_ + dt_), [&](int64_t task, int64_t) {
      const Tile& tile = tiles[task];
      const int64_t rows = std::min(kTile, tile.width_left - tile.row);
      const int64_t cols = std::min(kTile, tile.width_right - tile.col);
      const View<T> left = View<T>(tile.left + tile.row, count, rows, tile.width_left).transposed();
      const View<T> right(tile.right + tile.col, count, cols, tile.width_right);
      T* out = tile.out + tile.row * tile.width_right + tile.col;
      if (first) {
        gemm(left, right, out, tile.width_right);
      } else {
        gemm_add(left, right, T(1), out, tile.width_right);
      }
    });
  }

  // |A|^2 of a Gram matrix; of a symmetric one the tiles above the diagonal count twice.
  static double squared_norm(const T* matrix, int64_t rows, int64_t cols, bool symmetric) {
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const T* line = matrix + i * cols;
      const int64_t begin = symmetric ? i / kTile * kTile : 0;
      const int64_t middle = symmetric ? std::min(begin + kTile, cols) : cols;
      sum += wide_dot(line + begin, line + begin, middle - begin);
      sum += 2 * wide_dot(line + middle, line + middle, cols - middle);
    }
    return sum;
  }

  double numerator() const {
    double errors = 0, diagonal = 0;
    for (int64_t u = 0; u < row_.size(); ++u) {
      const double weight = pairs_.weight[row_.first + u], b = offset_.get()[u];
      errors += weight * b * b;
      // a pair of a span with itself adds nothing, unless one of the two is the zero vector
      const bool zero_s = pairs_.student_scale[row_.first + u] == 0, zero_t = pairs_.teacher_scale[row_.first + u] == 0;
      if (zero_s != zero_t) diagonal += weight * weight;
    }
    const double sum = omega_ * omega_ * delta_ * delta_ + 2 * omega_ * errors +
                       squared_norm(xx_.get(), ds_, ds_, true) - 2 * squared_norm(yx_.get(), dt_, ds_, false) +
                       squared_norm(yy_.get(), dt_, dt_, true) - diagonal;
    return sum < 0 ? 0 : sum;  // the terms cancel: rounding may leave less than nothing; a NaN stays
  }

  // 4 W_u [omega (delta + b_u) m + sum W b x + x_u X'DX - y_u Y'DX], through the normalisation.
  void write_gradient() {
    for (int64_t i = 0; i < ds_; ++i) {
      for (int64_t j = 0; j < i / kTile * kTile; ++j) xx_.get()[i * ds_ + j] = xx_.get()[j * ds_ + i];
    }
    struct Workspace {
      Scratch<T> x, y, state;
    };
    each_block(0, row_.size(), row_.size() * ds_ * (ds_ + dt_), [&](int64_t, int64_t begin, int64_t end) {
      const int64_t count = end - begin;
      Workspace work{Scratch<T>(count * ds_), Scratch<T>(count * dt_), Scratch<T>(std::max(ds_, dt_))};
      for (int64_t u = begin; u < end; ++u) {
        centre_span(u, work.state.get(), work.x.get() + (u - begin) * ds_, work.y.get() + (u - begin) * dt_);
      }
      T* out = pairs_.gradient + (row_.first + begin) * ds_;
      gemm(View<T>(work.x.get(), count, ds_, ds_), View<T>(xx_.get(), ds_, ds_, ds_), out, ds_);
      gemm_add(View<T>(work.y.get(), count, dt_, dt_), View<T>(yx_.get(), dt_, ds_, ds_), T(-1), out, ds_);
      for (int64_t u = begin; u < end; ++u, out += ds_) {
        const int64_t at = row_.first + u;
        const T scale = pairs_.student_scale[at];
        add_scaled(out, mean_.get(), static_cast<T>(omega_ * (delta_ + offset_.get()[u])), ds_);
        add_scaled(out, pull_.get(), T(1), ds_);
        T* unit = work.state.get();
        scale_to(unit, pairs_.student.template row<T>(at, unit), scale, ds_);
        tangent(unit, T(1), 4 * pairs_.weight[at] * scale, ds_, out);
      }
    });
  }

  const SpanPairs<T>& pairs_;
  const SpanRow row_;
  const int64_t ds_, dt_;
  double omega_ = 0, delta_ = 0;
  Scratch<T> mean_, pull_;  // (m, n); sum W b x
  Scratch<double> offset_;  // b
  Scratch<T> x_, wx_, y_, wy_, xx_, yx_, yy_;
};

}  // namespace

template <typename T>
T gram_row(const SpanPairs<T>& pairs, const SpanRow& row) {
  return GramRow<T>(pairs, row).run();
}

template float gram_row<float>(const SpanPairs<float>&, const SpanRow&);
template double gram_row<double>(const SpanPairs<double>&, const SpanRow&);

}  // namespace mta_fast
