// Activations of the recurrent families, the root-mean-square norm and the short convolution.
//
// The bits of an element do not depend on its index or on other rows: loops without contraction,
// sums over sixteen fixed lanes. Included by kernels.cpp only.
#pragma once

#include "elementwise.h"
#include "kernels.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

inline float silu_of(float x) { return x / (1.0f + exponential(-x)); }

inline float sigmoid_of(float x) { return 1.0f / (1.0f + exponential(-x)); }

// log(1 + t) for t in [0, 1]: 2 atanh(t / (2 + t)), by its series.
inline float log_of_one_plus(float t) {
  const float s = t / (2.0f + t), square = s * s;
  float y = 1.0f / 17.0f;
  y = multiply_add(y, square, 1.0f / 15.0f);
  y = multiply_add(y, square, 1.0f / 13.0f);
  y = multiply_add(y, square, 1.0f / 11.0f);
  y = multiply_add(y, square, 1.0f / 9.0f);
  y = multiply_add(y, square, 1.0f / 7.0f);
  y = multiply_add(y, square, 1.0f / 5.0f);
  y = multiply_add(y, square, 1.0f / 3.0f);
  y = multiply_add(y, square, 1.0f);
  return 2.0f * s * y;
}

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|).
inline float softplus_of(float x) {
  const float magnitude = x < 0.0f ? -x : x;
  return (x < 0.0f ? 0.0f : x) + log_of_one_plus(exponential(-magnitude));
}

// (1 - e) / (1 + e), e = e^-2|x|; near 0, where that cancels, the series.
inline float tanh_of(float x) {
  const float magnitude = x < 0.0f ? -x : x;
  const float e = exponential(-2.0f * magnitude);
  const float far = (1.0f - e) / (1.0f + e);
  const float square = x * x;
  float y = 62.0f / 2835.0f;
  y = multiply_add(y, square, -17.0f / 315.0f);
  y = multiply_add(y, square, 2.0f / 15.0f);
  y = multiply_add(y, square, -1.0f / 3.0f);
  y = multiply_add(y, square, 1.0f);
  const float near = y * x;
  return magnitude < 0.25f ? near : (x < 0.0f ? -far : far);
}

template <float (*function)(float)>
void each_element(const RowsParams& p, int64_t row) {
  const float* x = p.x + row * p.x_stride;
  float* __restrict out = p.out + row * p.out_stride;
  for (int64_t i = 0; i < p.columns; ++i) out[i] = function(x[i]);
}

// weight × x / sqrt(mean(x²) + epsilon), the mean over each group of a row.
inline void rms_norm(const RMSNormParams& p, int64_t row) {
  const float* x = p.x + row * p.x_stride;
  float* __restrict out = p.out + row * p.columns;
  const int64_t width = p.columns / p.groups;
  for (int64_t first = 0; first < p.columns; first += width) {
    const float mean = sum_of_squares(x + first, width) / (float)width;
    const float scale = 1.0f / __builtin_sqrtf(mean + p.epsilon);
    for (int64_t i = first; i < first + width; ++i) out[i] = x[i] * scale * p.weight[i];
  }
}

// One segment's tokens in some channels: each sum begins with the bias and goes from the oldest
// input to the current one, with a rounding after every operation. The tail is then moved on.
inline void short_convolution(const ShortConvolutionParams& p, int64_t task) {
  const int64_t segment = task / p.splits();
  const int64_t first = task % p.splits() * kConvolutionChannels;
  const int64_t last = min(first + kConvolutionChannels, p.channels);
  const int64_t begin = p.first(segment), end = p.first(segment + 1);
  const int32_t slot = p.state_indices[segment];
  if (slot == kPaddingSlot) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t c = first; c < last; ++c) p.out[t * p.channels + c] = 0.0f;
    return;
  }
  float* tail = p.tails + slot * p.tail_stride;
  const int64_t kept = p.width - 1;
  for (int64_t t = begin; t < end; ++t) {
    float* __restrict out = p.out + t * p.channels;
    for (int64_t c = first; c < last; ++c) out[c] = p.bias ? p.bias[c] : 0.0f;
    for (int64_t j = 0; j < p.width; ++j) {
      const int64_t at = t - begin - kept + j;  // of the input, counted from the segment's first
      const float* x = at < 0 ? tail + (at + kept) * p.channels : p.x + (begin + at) * p.x_stride;
      const float* weight = p.weight + j * p.channels;
      for (int64_t c = first; c < last; ++c) out[c] += weight[c] * x[c];
    }
  }
  for (int64_t j = 0; j < kept; ++j) {
    const int64_t at = end - begin - kept + j;
    const float* x = at < 0 ? tail + (at + kept) * p.channels : p.x + (begin + at) * p.x_stride;
    float* to = tail + j * p.channels;
    for (int64_t c = first; c < last; ++c) to[c] = x[c];
  }
}

}  // namespace cottention::COTTENTION_ISA
