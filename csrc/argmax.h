// The place of a row's largest element. Included by kernels.cpp only.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

// A row's largest element; not a number where any element is none.
inline float largest(const float* x, int64_t count) {
  float best[kLanes];
  uint32_t is_none[kLanes] = {};
  for (int64_t j = 0; j < kLanes; ++j) best[j] = x[0];
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) {
      best[j] = x[i + j] > best[j] ? x[i + j] : best[j];
      is_none[j] |= x[i + j] != x[i + j];
    }
  for (int64_t j = 0; i < count; ++i, ++j) {
    best[j] = x[i] > best[j] ? x[i] : best[j];
    is_none[j] |= x[i] != x[i];
  }
  for (int64_t j = 1; j < kLanes; ++j) {
    best[0] = best[j] > best[0] ? best[j] : best[0];
    is_none[0] |= is_none[j];
  }
  return is_none[0] ? __builtin_nanf("") : best[0];
}

// The first place of a row's largest element; -1 where that is not finite, or the row is empty.
inline void likeliest(const LikeliestParams& p, int64_t row) {
  const float* x = p.x + row * p.x_stride;
  const float best = p.columns ? largest(x, p.columns) : __builtin_nanf("");
  int64_t place = -1;
  if (best - best == 0.0f)
    for (place = 0; x[place] != best; ++place) {
    }
  p.out[row] = place;
}

}  // namespace cottention::COTTENTION_ISA
