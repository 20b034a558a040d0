#include "vector.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

// Where the loader can choose between versions of a function (x86-64, ELF), each is compiled for plain x86-64, AVX2
// with FMA, and AVX-512; elsewhere (aarch64 has its vectors always) once. The levels ask what a processor can do, so
// that AMD's are served too: "arch=haswell" is true of Intel's alone. Older GCC and Clang don't know them here.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
#define MTA_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#elif defined(__x86_64__) && defined(__gnu_linux__)
#define MTA_MULTIVERSION __attribute__((target_clones("default", "avx2")))
#else
#define MTA_MULTIVERSION
#endif
// Products are rounded before they are subtracted: a fused one would make a difference of equal terms not quite 0.
#if defined(__GNUC__) && !defined(__clang__)
#define MTA_ROUNDED_PRODUCTS __attribute__((optimize("fp-contract=off")))
#else
#define MTA_ROUNDED_PRODUCTS
#endif
#define MTA_INLINE [[gnu::always_inline]] inline
#define MTA_INLINE_LAMBDA __attribute__((always_inline))

namespace mta_fast {

namespace {

// exp(x) for x <= 0 in a form that compilers turn into vector code; relative error below 3e-7. Subnormal below -87.33,
// and 0 from -104 on: a softmax term must vanish where the reference's does, as what it weighs may be all there is.
// NaN for NaN.
MTA_INLINE float exp_of(float x) {
  constexpr float kLowest = -104.0f, kLog2e = 1.44269504f, kRound = 12582912.0f;  // 1.5 * 2^23
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  float clamped = x < kLowest ? kLowest : x;
  float shifted = clamped * kLog2e + kRound;  // the integer nearest to x / ln 2 stands in the low bits
  float integer = shifted - kRound;
  float r = (clamped - integer * kLn2High) - integer * kLn2Low;  // |r| <= ln 2 / 2
  float p = 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^integer as 2^(integer + 64) 2^-64: the second product alone leaves the normal range, and rounds as it should
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127u + 64u) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power * 0x1p-64f;
}

MTA_INLINE double exp_of(double x) { return std::exp(x); }

// Reductions keep kLanes partial results, so that several vector registers fill while one waits for its last sum.
constexpr int kLanes = 32;

// step(lane, i) for all i in [0, n), the lanes one after the other.
template <typename Step>
MTA_INLINE void by_lanes(int64_t n, const Step& step) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) step(lane, i + lane);
  }
  for (int lane = 0; i + lane < n; ++lane) step(lane, i + lane);
}

template <typename T>
MTA_INLINE T folded(const T* lanes) {
  T sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

template <typename T>
MTA_INLINE T sum_of_products(const T* a, const T* b, int64_t n) {
  T sum[kLanes] = {};
  by_lanes(n, [&](int lane, int64_t i) MTA_INLINE_LAMBDA { sum[lane] += a[i] * b[i]; });
  return folded(sum);
}

template <typename T>
MTA_INLINE double wide_sum_of_products(const T* a, const T* b, int64_t n) {
  double sum[kLanes] = {};
  by_lanes(n, [&](int lane, int64_t i) MTA_INLINE_LAMBDA { sum[lane] += static_cast<double>(a[i]) * b[i]; });
  return folded(sum);
}

// Sums of squares within these are right in float32: no square that counts was flushed, none is infinite.
constexpr double kLeastSquares = 0x1p-80, kMostSquares = 0x1p+120;

template <typename T>
MTA_INLINE bool fits(T squares) {
  return squares >= static_cast<T>(kLeastSquares) && squares <= static_cast<T>(kMostSquares);
}

// 2^-e for the largest |a_i| in [2^e, 2^(e + 1)), exact to multiply with; e within the range of normal numbers.
template <typename T>
MTA_INLINE T power_of_two(const T* a, int64_t n) {
  T top[kLanes] = {};
  by_lanes(n, [&](int lane, int64_t i) MTA_INLINE_LAMBDA {
    const T size = std::abs(a[i]);
    top[lane] = size > top[lane] ? size : top[lane];
  });
  for (int lane = 1; lane < kLanes; ++lane) top[0] = top[lane] > top[0] ? top[lane] : top[0];
  constexpr int kBound = std::numeric_limits<T>::max_exponent - 2;
  int exponent = kBound;
  if (top[0] <= std::numeric_limits<T>::max()) std::frexp(top[0], &exponent);
  return std::ldexp(T(1), -std::clamp(exponent - 1, -kBound, kBound));
}

template <typename T>
MTA_INLINE T norm_of(const T* a, int64_t n) {
  const T squares = sum_of_products(a, a, n);
  if (fits(squares)) return std::sqrt(squares);
  const T scale = power_of_two(a, n);
  T sum[kLanes] = {};
  by_lanes(n, [&](int lane, int64_t i) MTA_INLINE_LAMBDA { sum[lane] += (scale * a[i]) * (scale * a[i]); });
  return std::sqrt(folded(sum)) / scale;
}

template <typename T>
MTA_INLINE void cosine_of(const T* a, const T* b, int64_t n, T* out) {
  T aa[kLanes] = {}, bb[kLanes] = {}, ab[kLanes] = {};
  by_lanes(n, [&](int lane, int64_t i) MTA_INLINE_LAMBDA {
    aa[lane] += a[i] * a[i];
    bb[lane] += b[i] * b[i];
    ab[lane] += a[i] * b[i];
  });
  const T squares_a = folded(aa), squares_b = folded(bb);
  if (fits(squares_a) && fits(squares_b)) {
    out[0] = 1 / std::sqrt(squares_a);
    out[1] = 1 / std::sqrt(squares_b);
    out[2] = folded(ab) * out[0] * out[1];
    return;
  }
  out[0] = inverse_norm(norm_of(a, n));
  out[1] = inverse_norm(norm_of(b, n));
  T cosine[kLanes] = {};
  by_lanes(n, [&](int lane, int64_t i) MTA_INLINE_LAMBDA { cosine[lane] += (out[0] * a[i]) * (out[1] * b[i]); });
  out[2] = folded(cosine);
}

template <typename T>
MTA_INLINE T distance_from_mean(const T* a, int64_t n) {
  double sum[kLanes] = {};  // a mean that is off by a rounding would be what the 1e-5 of the importance is
  T squares[kLanes] = {};
  by_lanes(n, [&](int lane, int64_t i) MTA_INLINE_LAMBDA { sum[lane] += a[i]; });
  const T mean = static_cast<T>(folded(sum) / static_cast<double>(n));
  by_lanes(n, [&](int lane, int64_t i) MTA_INLINE_LAMBDA { squares[lane] += (a[i] - mean) * (a[i] - mean); });
  const T plain = folded(squares);
  if (plain <= static_cast<T>(kMostSquares)) return std::sqrt(plain);  // what vanishes below counts for nothing
  const T scale = power_of_two(a, n);
  T scaled[kLanes] = {};
  by_lanes(n, [&](int lane, int64_t i) MTA_INLINE_LAMBDA {
    const T deviation = scale * a[i] - scale * mean;
    scaled[lane] += deviation * deviation;
  });
  return std::sqrt(folded(scaled)) / scale;
}

template <typename T>
MTA_INLINE T exponentials(T* a, int64_t n) {
  T top[kLanes], sum[kLanes] = {};
  for (T& lane : top) lane = -std::numeric_limits<T>::infinity();
  by_lanes(n, [&](int lane, int64_t i) MTA_INLINE_LAMBDA { top[lane] = a[i] > top[lane] ? a[i] : top[lane]; });
  for (int lane = 1; lane < kLanes; ++lane) top[0] = top[lane] > top[0] ? top[lane] : top[0];
  const T highest = top[0];
  for (int64_t i = 0; i < n; ++i) a[i] = exp_of(a[i] - highest);
  by_lanes(n, [&](int lane, int64_t i) MTA_INLINE_LAMBDA { sum[lane] += a[i]; });
  return folded(sum);
}

// log(1 + u) for u in [0, 1], as 2 atanh(u / (2 + u)); relative error below 2e-7.
MTA_INLINE float log1p_of(float u) {
  const float z = u / (2.0f + u), y = z * z;  // z <= 1/3
  float p = 1.0f / 15.0f;
  p = p * y + 1.0f / 13.0f;
  p = p * y + 1.0f / 11.0f;
  p = p * y + 1.0f / 9.0f;
  p = p * y + 1.0f / 7.0f;
  p = p * y + 1.0f / 5.0f;
  p = p * y + 1.0f / 3.0f;
  p = p * y + 1.0f;
  return 2.0f * z * p;
}

MTA_INLINE double log1p_of(double u) { return std::log1p(u); }

MTA_INLINE float tanh_of(float x) {
  const float size = std::abs(x), e = exp_of(-2.0f * size), y = x * x;
  const float far = (1.0f - e) / (1.0f + e), signed_far = x < 0 ? -far : far;
  const float near = x * (1.0f + y * (-1.0f / 3.0f + y * (2.0f / 15.0f - y * (17.0f / 315.0f))));  // 1 - e loses digits
  return size < 0.125f ? near : signed_far;
}

MTA_INLINE double tanh_of(double x) { return std::tanh(x); }

template <typename T>
MTA_INLINE void logits_of(T* a, const T* bias, const HeadOf<T>& head, int64_t n) {
  if (bias != nullptr) {
    for (int64_t i = 0; i < n; ++i) a[i] += bias[i];
  }
  if (head.softcap > 0) {
    const T inner = head.scale / head.softcap, outer = head.softcap / head.temperature;
    for (int64_t i = 0; i < n; ++i) a[i] = outer * tanh_of(inner * a[i]);
  } else if (const T factor = head.scale / head.temperature; factor != 1) {
    for (int64_t i = 0; i < n; ++i) a[i] *= factor;
  }
}

template <typename T>
MTA_INLINE void sum_of_exponentials(const T* a, int64_t n, T* out) {
  T top[kLanes], sum[kLanes] = {};
  for (T& lane : top) lane = -std::numeric_limits<T>::infinity();
  by_lanes(n, [&](int lane, int64_t i) MTA_INLINE_LAMBDA { top[lane] = a[i] > top[lane] ? a[i] : top[lane]; });
  for (int lane = 1; lane < kLanes; ++lane) top[0] = top[lane] > top[0] ? top[lane] : top[0];
  const T highest = top[0];
  by_lanes(n, [&](int lane, int64_t i) MTA_INLINE_LAMBDA { sum[lane] += exp_of(a[i] - highest); });
  out[0] = highest;
  out[1] = folded(sum);
}

constexpr int64_t kBlockTerms = 4096;  // are summed in the compute dtype, blocks in float64

// terms(log p, log q, q) -> {value, q g}, over a row.
template <typename T, typename Terms>
MTA_INLINE void sums_of_terms(T s_sum, T t_sum, T cap, bool write, T* s, T* t, int64_t n, double* out,
                              const Terms& terms) {
  out[0] = out[1] = 0;
  for (int64_t first = 0; first < n; first += kBlockTerms) {
    T value[kLanes] = {}, total[kLanes] = {};
    T *x = s + first, *y = t + first;
    by_lanes(std::min(kBlockTerms, n - first), [&](int lane, int64_t i) MTA_INLINE_LAMBDA {
      const T z = x[i], log_q = z - s_sum, q = exp_of(log_q);
      T made, weighted;
      terms(y[i] - t_sum, log_q, q, made, weighted);
      value[lane] += made;
      total[lane] += weighted;
      if (write) {
        const T slope = 1 - (cap * z) * (cap * z);
        x[i] = slope * weighted;
        y[i] = slope * q;
      }
    });
    out[0] += static_cast<double>(folded(value));
    out[1] += static_cast<double>(folded(total));
  }
}

// log(exp x + exp y), and the two's shares of the sum.
template <typename T>
MTA_INLINE T log_of_sum(T x, T y, T& x_share, T& y_share) {
  const bool x_leads = x >= y;
  const T high = x_leads ? x : y, low = x_leads ? y : x, e = exp_of(low - high), one = 1 / (1 + e), other = e * one;
  x_share = x_leads ? one : other;
  y_share = x_leads ? other : one;
  return high + log1p_of(e);
}

template <typename T>
MTA_INLINE void terms_of(Kind kind, bool detach, T share, T s_sum, T t_sum, const HeadOf<T>& head, bool write, T* s,
                         T* t, int64_t n, double* out) {
  const T cap = head.softcap > 0 ? head.temperature / head.softcap : T(0);
  const T log_share = std::log(share), log_rest = std::log1p(-share), kept = detach ? T(0) : T(1);
  const auto run = [&](const auto& terms)
                       MTA_INLINE_LAMBDA { sums_of_terms(s_sum, t_sum, cap, write, s, t, n, out, terms); };
  switch (kind) {
    case Kind::kForwardKl:
      run([&](T log_p, T log_q, T, T& value, T& weighted) MTA_INLINE_LAMBDA {
        const T p = exp_of(log_p);
        value = p * (log_p - log_q);
        weighted = -p;
      });
      out[1] = -1;  // what the sum is, to rounding: ds = q - p
      break;
    case Kind::kReverseKl:
      run([&](T log_p, T log_q, T q, T& value, T& weighted)
              MTA_INLINE_LAMBDA { value = weighted = q * (log_q - log_p); });
      break;
    case Kind::kSkl:
      run([&](T log_p, T log_q, T, T& value, T& weighted) MTA_INLINE_LAMBDA {
        T of_p, of_q;
        const T mixture = log_of_sum(log_p + log_share, log_q + log_rest, of_p, of_q), p = exp_of(log_p);
        value = p * (log_p - mixture);
        weighted = -kept * (p * of_q);
      });
      break;
    case Kind::kSrkl:
      run([&](T log_p, T log_q, T q, T& value, T& weighted) MTA_INLINE_LAMBDA {
        T of_q, of_p;
        const T mixture = log_of_sum(log_q + log_share, log_p + log_rest, of_q, of_p);
        value = q * (log_q - mixture);
        weighted = value - kept * (q * of_q);
      });
      break;
    case Kind::kJsd:
      run([&](T log_p, T log_q, T q, T& value, T& weighted) MTA_INLINE_LAMBDA {
        T of_p, of_q;
        const T mixture = log_of_sum(log_p + log_share, log_q + log_rest, of_p, of_q);
        weighted = (1 - share) * (q * (log_q - mixture));
        value = share * (exp_of(log_p) * (log_p - mixture)) + weighted;
      });
      break;
    case Kind::kCrossEntropy:
      break;  // has no t
  }
}

template <typename T>
MTA_INLINE T squares_by_weight(const T* a, const T* w, int64_t n) {
  T sum[kLanes] = {};
  by_lanes(n, [&](int lane, int64_t i) MTA_INLINE_LAMBDA { sum[lane] += w[i] * a[i] * a[i]; });
  return folded(sum);
}

}  // namespace

#define MTA_VECTOR_FUNCTIONS(T)                                                                                    \
  MTA_MULTIVERSION void head_logits(T* a, const T* bias, const HeadOf<T>& head, int64_t n) {                       \
    logits_of(a, bias, head, n);                                                                                   \
  }                                                                                                                \
  MTA_MULTIVERSION void exponential_sum(const T* a, int64_t n, T* out) { sum_of_exponentials(a, n, out); }         \
  MTA_MULTIVERSION void divergence_terms(Kind kind, bool detach, T share, T s_sum, T t_sum, const HeadOf<T>& head, \
                                         bool write, T* s, T* t, int64_t n, double* out) {                         \
    terms_of(kind, detach, share, s_sum, t_sum, head, write, s, t, n, out);                                        \
  }                                                                                                                \
  MTA_MULTIVERSION void exponentials_into(T* a, T sum, T cap, T factor, int64_t n) {                               \
    for (int64_t i = 0; i < n; ++i) a[i] = factor * exp_of(a[i] - sum) * (1 - (cap * a[i]) * (cap * a[i]));        \
  }                                                                                                                \
  MTA_MULTIVERSION void subtract_share(T* a, const T* b, T total, T factor, int64_t n) {                           \
    for (int64_t i = 0; i < n; ++i) a[i] = factor * (a[i] - total * b[i]);                                         \
  }                                                                                                                \
  MTA_MULTIVERSION T dot(const T* a, const T* b, int64_t n) { return sum_of_products(a, b, n); }                   \
  MTA_MULTIVERSION double wide_dot(const T* a, const T* b, int64_t n) { return wide_sum_of_products(a, b, n); }    \
  MTA_MULTIVERSION void centre(T* a, const T* b, T scale, const T* c, int64_t n) {                                 \
    for (int64_t i = 0; i < n; ++i) a[i] = scale * b[i] - c[i];                                                    \
  }                                                                                                                \
  MTA_MULTIVERSION T norm(const T* a, int64_t n) { return norm_of(a, n); }                                         \
  MTA_MULTIVERSION void cosine(const T* a, const T* b, int64_t n, T* out) { cosine_of(a, b, n, out); }             \
  MTA_MULTIVERSION T centred_norm(const T* a, int64_t n) { return distance_from_mean(a, n); }                      \
  MTA_MULTIVERSION void scale_to(T* a, const T* b, T scale, int64_t n) {                                           \
    for (int64_t i = 0; i < n; ++i) a[i] = scale * b[i];                                                           \
  }                                                                                                                \
  MTA_MULTIVERSION void add_scaled(T* a, const T* b, T scale, int64_t n) {                                         \
    for (int64_t i = 0; i < n; ++i) a[i] += scale * b[i];                                                          \
  }                                                                                                                \
  MTA_MULTIVERSION void combine(T* a, const T* b, T x, T y, int64_t n) {                                           \
    for (int64_t i = 0; i < n; ++i) a[i] = x * a[i] + y * b[i];                                                    \
  }                                                                                                                \
  MTA_MULTIVERSION void cosine_gradient(T* a, const T* b, T x, T y, T cosine, T factor, int64_t n) {               \
    for (int64_t i = 0; i < n; ++i) a[i] = factor * (cosine * (x * a[i]) - y * b[i]);                              \
  }                                                                                                                \
  MTA_MULTIVERSION void multiply(T* a, const T* b, T scale, int64_t n) {                                           \
    for (int64_t i = 0; i < n; ++i) a[i] *= scale * b[i];                                                          \
  }                                                                                                                \
  MTA_MULTIVERSION T softmax_terms(T* a, int64_t n) { return exponentials(a, n); }                                 \
  MTA_ROUNDED_PRODUCTS MTA_MULTIVERSION void cosine_error(T* a, const T* b, T x, const T* t, const T* c, T y,      \
                                                          int64_t n) {                                             \
    for (int64_t i = 0; i < n; ++i) a[i] = x * b[i] * a[i] - y * c[i] * t[i];                                      \
  }                                                                                                                \
  MTA_MULTIVERSION T weighted_squares(const T* a, const T* w, int64_t n) { return squares_by_weight(a, w, n); }

MTA_VECTOR_FUNCTIONS(float)
MTA_VECTOR_FUNCTIONS(double)

}  // namespace mta_fast
