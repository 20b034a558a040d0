// Loops over features, keys and spans, compiled for several instruction sets; the processor chooses at load time.
// Sums run over the lanes of a vector register: their order depends on the processor, never on the thread count.
#pragma once

#include <cstdint>
#include <limits>

namespace mta_fast {

// 1 / norm; 0 below the smallest normal number: so short a vector counts as the zero vector. NaN for an infinite norm,
// whose reciprocal would pass for a zero vector's.
template <typename T>
T inverse_norm(T norm) {
  if (norm < std::numeric_limits<T>::min()) return 0;
  return norm == std::numeric_limits<T>::infinity() ? std::numeric_limits<T>::quiet_NaN() : 1 / norm;
}

// How far q is from p: reference.divergence; a label's probability in place of p for kCrossEntropy.
enum class Kind { kForwardKl, kReverseKl, kSkl, kSrkl, kJsd, kCrossEntropy };

// What an LM head does beside its product: softcap(scale (x + bias)) / temperature; no softcap where it is 0.
template <typename T>
struct HeadOf {
  T scale, softcap, temperature;
};

#define MTA_VECTOR_FUNCTIONS(T)                                                                                     \
  /* products a_i to logits; `bias` may be null */                                                                  \
  void head_logits(T* a, const T* bias, const HeadOf<T>& head, int64_t n);                                          \
  /* out: max a, sum of exp(a_i - max a) */                                                                         \
  void exponential_sum(const T* a, int64_t n, T* out);                                                              \
  /* out: the divergence of a row of logits s, t less their log-sum-exps (s, t                                      \
     hold these), and sum q g; where `write`, s_i becomes q g and t_i becomes q,                                    \
     each times the softcap's derivative. `share` is alpha or beta */                                               \
  void divergence_terms(Kind kind, bool detach, T share, T s_sum, T t_sum, const HeadOf<T>& head, bool write, T* s, \
                        T* t, int64_t n, double* out);                                                              \
  /* a_i = factor exp(a_i - sum) (1 - (cap a_i)^2) */                                                               \
  void exponentials_into(T* a, T sum, T cap, T factor, int64_t n);                                                  \
  /* a_i = factor (a_i - total b_i) */                                                                              \
  void subtract_share(T* a, const T* b, T total, T factor, int64_t n);                                              \
  /* sum of a_i b_i */                                                                                              \
  T dot(const T* a, const T* b, int64_t n);                                                                         \
  double wide_dot(const T* a, const T* b, int64_t n); /* in float64 */                                              \
  /* |a|; of any row whose norm is finite, as is the next two's */                                                  \
  T norm(const T* a, int64_t n);                                                                                    \
  /* 1/|a|, 1/|b| (0 for a zero vector) and cos(a, b), in one pass */                                               \
  void cosine(const T* a, const T* b, int64_t n, T* out);                                                           \
  /* the norm of a less its mean: sqrt(sum (a_i - mean)^2) */                                                       \
  T centred_norm(const T* a, int64_t n);                                                                            \
  /* a_i = scale b_i;  a_i += scale b_i;  a_i = x a_i + y b_i */                                                    \
  void scale_to(T* a, const T* b, T scale, int64_t n);                                                              \
  void add_scaled(T* a, const T* b, T scale, int64_t n);                                                            \
  void combine(T* a, const T* b, T x, T y, int64_t n);                                                              \
  /* a_i = scale b_i - c_i */                                                                                       \
  void centre(T* a, const T* b, T scale, const T* c, int64_t n);                                                    \
  /* a_i = factor (cosine x a_i - y b_i), with x, y = 1/|a|, 1/|b| */                                               \
  void cosine_gradient(T* a, const T* b, T x, T y, T cosine, T factor, int64_t n);                                  \
  /* a_i *= scale b_i */                                                                                            \
  void multiply(T* a, const T* b, T scale, int64_t n);                                                              \
  /* a_i becomes exp(a_i - max a); the sum of all */                                                                \
  T softmax_terms(T* a, int64_t n);                                                                                 \
  /* a_i = x b_i a_i - y c_i t_i: the difference of two cosines */                                                  \
  void cosine_error(T* a, const T* b, T x, const T* t, const T* c, T y, int64_t n);                                 \
  /* sum of w_i a_i^2 */                                                                                            \
  T weighted_squares(const T* a, const T* w, int64_t n);

MTA_VECTOR_FUNCTIONS(float)
MTA_VECTOR_FUNCTIONS(double)
#undef MTA_VECTOR_FUNCTIONS

}  // namespace mta_fast
