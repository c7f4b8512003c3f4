// The steps between the products of an RWKV-7 block: token shift, and all that happens in a head.
//
// Every operation rounds as the separate ops of engine/models/rwkv7/model.py do, so that the bits
// are the same. Included by kernels.cpp only.
#pragma once

#include "activations.h"
#include "kernels.h"
#include "recurrent.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

constexpr float kDecayScale = -0.60653065971263342f;  // -e^(-1/2)
constexpr double kUnitFloor = 1e-12;                  // the least length of a removal key

// y + (before - y) x for each of the mixes x.
inline void token_mix(const TokenMixParams& p, int64_t token) {
  const float* y = p.y + token * p.channels;
  const float* before = p.before[token];
  for (int64_t i = 0; i < p.mixes; ++i) {
    const float* mix = p.mix + i * p.channels;
    float* __restrict out = p.out + i * p.mix_stride + token * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) out[c] = y[c] + (before[c] - y[c]) * mix[c];
  }
}

inline void relu_squared(const RowsParams& p, int64_t row) {
  const float* x = p.x + row * p.x_stride;
  float* out = p.out + row * p.out_stride;
  for (int64_t i = 0; i < p.columns; ++i) {
    const float positive = x[i] < 0.0f ? 0.0f : x[i];
    out[i] = positive * positive;
  }
}

// What the recurrence takes, in the place of what the products gave: w the decay, a minus the unit
// removal key, b that key times the gate, k and v mixed.
inline void prepare_head(const RWKV7HeadsParams& p, int64_t at, int64_t channel) {
  const int64_t width = p.recurrent.key_width;
  float *k = p.k + at, *v = p.v + at, *w = p.w + at, *a = p.a + at, *b = p.b + at;
  const float *k_k = p.k_k + channel, *k_a = p.k_a + channel;
  for (int64_t c = 0; c < width; ++c) w[c] = exponential(kDecayScale * sigmoid_of(w[c]));
  for (int64_t c = 0; c < width; ++c) b[c] = k[c] * k_k[c];
  const float mean = sum_of_squares(b, width) / (float)width;
  const float scale = 1.0f / __builtin_sqrtf(mean + (float)(kUnitFloor * kUnitFloor / (double)width));
  for (int64_t c = 0; c < width; ++c) {
    const float gate = sigmoid_of(a[c]);
    const float removed = b[c] * scale * p.unit_weight;
    k[c] = k[c] * (1.0f + (gate - 1.0f) * k_a[c]);
    a[c] = -removed;
    b[c] = removed * gate;
  }
  if (!p.v_mix) return;
  const float *first = p.v_first + at, *mix = p.v_mix + at;
  for (int64_t c = 0; c < width; ++c) v[c] = v[c] + (first[c] - v[c]) * sigmoid_of(mix[c]);
}

// The outputs of the recurrence: normed, the bonus of the token itself added, gated.
inline void finish_head(const RWKV7HeadsParams& p, int64_t at, int64_t channel) {
  const int64_t width = p.recurrent.key_width;
  float* __restrict out = p.recurrent.out + at;
  const float *r = p.r + at, *k = p.k + at, *v = p.v + at, *g = p.g + at;
  const float* r_k = p.r_k + channel;
  const float mean = sum_of(out, width) / (float)width;
  for (int64_t c = 0; c < width; ++c) out[c] = out[c] - mean;
  const float variance = sum_of_squares(out, width) / (float)width;
  const float scale = 1.0f / __builtin_sqrtf(variance + p.norm_epsilon);
  float bonus = 0.0f;
  for (int64_t c = 0; c < width; ++c) bonus = multiply_add(1.0f, r[c] * k[c] * r_k[c], bonus);
  const float *weight = p.norm_weight + channel, *bias = p.norm_bias + channel;
  for (int64_t c = 0; c < width; ++c) {
    const float normed = multiply_add(out[c] * scale, 1.0f, 0.0f);
    out[c] = (normed * weight[c] + bias[c] + bonus * v[c]) * g[c];
  }
}

// A task is one head of one segment.
inline void rwkv7_heads(const RWKV7HeadsParams& p, int64_t task) {
  const RecurrentParams& s = p.recurrent;
  const HeadTask of = head_task(s, task);
  const int64_t channel = of.head * s.key_width, channels = s.heads * s.key_width;
  for (int64_t t = of.first; t < of.last; ++t) prepare_head(p, t * channels + channel, channel);
  recurrent_as<Form<Decay::kPerKey, true>>(s, task);
  for (int64_t t = of.first; t < of.last; ++t) finish_head(p, t * channels + channel, channel);
}

}  // namespace cottention::COTTENTION_ISA
