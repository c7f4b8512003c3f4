// Index of the largest element of a row. Included by kernels.cpp only.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

constexpr int64_t kCompared = 4 * kLanes;  // at a time: one comparison waits for another

// The largest element of a row; NaN if any element is NaN.
inline float max_of(const float* x, int64_t count) {
  float best[kCompared];
  uint32_t is_nan[kCompared] = {};
  for (int64_t j = 0; j < kCompared; ++j) best[j] = x[0];
  int64_t i = 0;
  for (; i + kCompared <= count; i += kCompared)
    for (int64_t j = 0; j < kCompared; ++j) {
      best[j] = x[i + j] > best[j] ? x[i + j] : best[j];
      is_nan[j] |= x[i + j] != x[i + j];
    }
  for (int64_t j = 0; i < count; ++i, ++j) {
    best[j] = x[i] > best[j] ? x[i] : best[j];
    is_nan[j] |= x[i] != x[i];
  }
  for (int64_t j = 1; j < kCompared; ++j) {
    best[0] = best[j] > best[0] ? best[j] : best[0];
    is_nan[0] |= is_nan[j];
  }
  return is_nan[0] ? __builtin_nanf("") : best[0];
}

// The first index of a value that the row has.
inline int64_t index_of(float value, const float* x, int64_t count) {
  int64_t i = 0;
  for (; i + kCompared <= count; i += kCompared) {
    uint32_t is_here = 0;
    for (int64_t j = 0; j < kCompared; ++j) is_here |= x[i + j] == value;
    if (is_here) break;
  }
  while (x[i] != value) ++i;
  return i;
}

// The first index of the largest element of a row; -1 if that is not finite or the row is empty.
inline void argmax(const ArgmaxParams& p, int64_t row) {
  const float* x = p.x + row * p.x_stride;
  const float best = p.columns ? max_of(x, p.columns) : __builtin_nanf("");
  p.out[row] = best - best == 0.0f ? index_of(best, x, p.columns) : -1;
}

}  // namespace cottention::COTTENTION_ISA
