// The scan of Mamba: S_cn ← exp(Δ_c A_cn) S_cn + Δ_c u_c k_n, out_c = Σ_n S_cn q_n.
//
// Every channel is a head of one value row, so that the recurrence is elementwise. A task has some
// channels of one segment, whose states stay in the L1 cache for all its tokens. Keys are processed
// sixteen at a time; those behind the last are zero. Sums run over sixteen fixed lanes. Included by
// kernels.cpp only.
#pragma once

#include "elementwise.h"
#include "kernels.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

// Sixteen keys of one channel; the caller has padded them.
inline Lanes scan_lanes(float* __restrict state, const float* log_decay, const float* k,
                        const float* q, float delta, float value, Lanes total) {
  for (int64_t n = 0; n < kLanes; ++n)
    state[n] = multiply_add(value, k[n], exponential(delta * log_decay[n]) * state[n]);
  return multiply_add(load(state), load(q), total);
}

// One token of a channel: `width` keys, of which the last may not fill the lanes.
inline float scan_channel(float* state, const float* log_decay, const float* k, const float* q,
                          int64_t width, float delta, float u) {
  const float value = delta * u;
  Lanes total = broadcast(0.0f);
  int64_t n = 0;
  for (; n + kLanes <= width; n += kLanes)
    total = scan_lanes(state + n, log_decay + n, k + n, q + n, delta, value, total);
  if (n < width) {
    const int64_t bytes = (width - n) * sizeof(float);
    float h[kLanes] = {}, decay[kLanes] = {}, key[kLanes] = {}, query[kLanes] = {};
    __builtin_memcpy(h, state + n, bytes);
    __builtin_memcpy(decay, log_decay + n, bytes);
    __builtin_memcpy(key, k + n, bytes);
    __builtin_memcpy(query, q + n, bytes);
    total = scan_lanes(h, decay, key, query, delta, value, total);
    __builtin_memcpy(state + n, h, bytes);
  }
  return sum(total);
}

inline void selective_scan(const SelectiveScanParams& p, int64_t task) {
  const int64_t segment = task / p.splits();
  const int64_t first = task % p.splits() * kScanChannels;
  const int64_t last = min(first + kScanChannels, p.channels);
  const int32_t slot = p.state_indices[segment];
  for (int64_t t = p.first(segment); t < p.first(segment + 1); ++t) {
    float* out = p.out + t * p.channels;
    if (slot == kPaddingSlot) {
      __builtin_memset(out + first, 0, (last - first) * sizeof(float));
      continue;
    }
    const float *k = p.k + t * p.k_stride, *q = p.q + t * p.q_stride;
    const float *u = p.u + t * p.u_stride, *delta = p.delta + t * p.delta_stride;
    float* state = p.state + slot * p.state_stride;
    for (int64_t c = first; c < last; ++c)
      out[c] = scan_channel(state + c * p.width, p.log_decay + c * p.width, k, q, p.width,
                            delta[c], u[c]);
  }
}

}  // namespace cottention::COTTENTION_ISA
