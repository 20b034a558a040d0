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

#define MTA_VECTOR_FUNCTIONS(T)                                                     \
  /* sum of a_i b_i */                                                              \
  T dot(const T* a, const T* b, int64_t n);                                         \
  double wide_dot(const T* a, const T* b, int64_t n); /* in float64 */              \
  /* |a|; of any row whose norm is finite, as is the next two's */                  \
  T norm(const T* a, int64_t n);                                                    \
  /* 1/|a|, 1/|b| (0 for a zero vector) and cos(a, b), in one pass */               \
  void cosine(const T* a, const T* b, int64_t n, T* out);                           \
  /* the norm of a less its mean: sqrt(sum (a_i - mean)^2) */                       \
  T centred_norm(const T* a, int64_t n);                                            \
  /* a_i = scale b_i;  a_i += scale b_i;  a_i = x a_i + y b_i */                    \
  void scale_to(T* a, const T* b, T scale, int64_t n);                              \
  void add_scaled(T* a, const T* b, T scale, int64_t n);                            \
  void combine(T* a, const T* b, T x, T y, int64_t n);                              \
  /* a_i = scale b_i - c_i */                                                       \
  void centre(T* a, const T* b, T scale, const T* c, int64_t n);                    \
  /* a_i = factor (cosine x a_i - y b_i), with x, y = 1/|a|, 1/|b| */               \
  void cosine_gradient(T* a, const T* b, T x, T y, T cosine, T factor, int64_t n);  \
  /* a_i *= scale b_i */                                                            \
  void multiply(T* a, const T* b, T scale, int64_t n);                              \
  /* a_i becomes exp(a_i - max a); the sum of all */                                \
  T softmax_terms(T* a, int64_t n);                                                 \
  /* a_i = x b_i a_i - y c_i t_i: the difference of two cosines */                  \
  void cosine_error(T* a, const T* b, T x, const T* t, const T* c, T y, int64_t n); \
  /* sum of w_i a_i^2 */                                                            \
  T weighted_squares(const T* a, const T* w, int64_t n);

MTA_VECTOR_FUNCTIONS(float)
MTA_VECTOR_FUNCTIONS(double)
#undef MTA_VECTOR_FUNCTIONS

}  // namespace mta_fast
