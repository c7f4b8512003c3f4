// Logits to unnormalised probabilities, after temperature and min_p. Included by kernels.cpp only.
#pragma once

#include "elementwise.h"
#include "kernels.h"

namespace cottention::COTTENTION_ISA {

// e^((x - max_logit) / temperature) of each logit; 0 if that is below min_p, and for NaN.
inline void sampling_weights(const SamplingWeightsParams& p) {
  for (int64_t i = 0; i < p.columns; ++i) {
    const float x = (p.x[i] - p.max_logit) / p.temperature;
    const float weight = exponential(x < 0.0f ? x : 0.0f);  // at most 1, also if max_logit is wrong
    p.out[i] = (x >= -87.0f) & (weight >= p.min_p) ? weight : 0.0f;
  }
}

}  // namespace cottention::COTTENTION_ISA
