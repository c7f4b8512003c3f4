// Logits to weights of chance. Included by kernels.cpp only.
#pragma once

#include "elementwise.h"
#include "kernels.h"

namespace cottention::COTTENTION_ISA {

// e^((x - best) / temperature) of a row, and 0 where that is less than `least` or nothing at all.
inline void weigh(const WeighParams& p) {
  for (int64_t i = 0; i < p.columns; ++i) {
    const float x = (p.x[i] - p.best) / p.temperature;
    const float weight = exponential(x < 0.0f ? x : 0.0f);  // 1 at most, whatever is given
    p.out[i] = (x >= -87.0f) & (weight >= p.least) ? weight : 0.0f;
  }
}

}  // namespace cottention::COTTENTION_ISA
