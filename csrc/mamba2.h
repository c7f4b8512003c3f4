// What happens in a head of a Mamba-2 block, between the convolution and the norm.
//
// Every operation rounds as the separate ops of engine/models/mamba/model.py do, so that the bits
// are the same. Included by kernels.cpp only.
#pragma once

#include "activations.h"
#include "kernels.h"
#include "recurrent.h"

namespace cottention::COTTENTION_ISA {

// Step Δ = softplus(step + bias) within its limits, decay exp(A Δ), values Δ x.
inline void prepare_head(const Mamba2HeadsParams& p, int64_t token, int64_t head) {
  const int64_t width = p.recurrent.value_width, heads = p.recurrent.heads;
  float delta = softplus_of(p.step[token * p.joined_stride + head] + p.step_bias[head]);
  delta = delta < p.least_step ? p.least_step : delta;
  delta = delta > p.greatest_step ? p.greatest_step : delta;
  p.w[token * heads + head] = exponential(p.log_decay[head] * delta);
  const float* x = p.x + token * p.x_stride + head * width;
  float* __restrict v = p.v + (token * heads + head) * width;
  for (int64_t c = 0; c < width; ++c) v[c] = delta * x[c];
}

// (out + D x) silu(gate).
inline void finish_head(const Mamba2HeadsParams& p, int64_t token, int64_t head) {
  const int64_t width = p.recurrent.value_width;
  const float* x = p.x + token * p.x_stride + head * width;
  const float* gate = p.gate + token * p.joined_stride + head * width;
  const float skip = p.skip[head];
  float* __restrict out = p.recurrent.out_at(token, head);
  for (int64_t c = 0; c < width; ++c) out[c] = (out[c] + skip * x[c]) * silu_of(gate[c]);
}

// A task is one head of one segment. Heads of a group have one key and one query.
inline void mamba2_heads(const Mamba2HeadsParams& p, int64_t task) {
  RecurrentParams s = p.recurrent;
  const HeadTask of = head_task(s, task);
  const int64_t group = of.head / (s.heads / p.groups);
  s.k.data += group * s.key_width;
  s.q.data += group * s.key_width;
  for (int64_t t = of.first; t < of.last; ++t) prepare_head(p, t, of.head);
  recurrent_as<Form<Decay::kPerHead, false>>(s, task);
  for (int64_t t = of.first; t < of.last; ++t) finish_head(p, t, of.head);
}

}  // namespace cottention::COTTENTION_ISA
