// Per-token operations around the recurrence: rotary embedding, unit norm, scaling by position,
// gelu in two forms, elu + 1 and layer norm.
//
// The compiler vectorises the elementwise loops. With contraction off, the bits of an element do
// not depend on its index. Sums run over sixteen fixed lanes. Included by kernels.cpp only.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

// Rotates the pairs (2i, 2i + 1) of one head's first 2 × pairs elements; the rest is copied.
inline void rotate(const float* x, const float* cos, const float* sin, int64_t pairs, int64_t width,
                   float* __restrict out) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    out[2 * i] = a * cos[i] - b * sin[i];
    out[2 * i + 1] = b * cos[i] + a * sin[i];
  }
  for (int64_t i = 2 * pairs; i < width; ++i) out[i] = x[i];
}

inline float sum_of_squares(const float* x, int64_t width) {
  Lanes total = broadcast(0.0f);
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) total = multiply_add(load(x + j), load(x + j), total);
  float rest[kLanes] = {};
  for (int64_t i = j; i < width; ++i) rest[i - j] = x[i];
  return sum(multiply_add(load(rest), load(rest), total));
}

inline void normalise(float* x, int64_t width) {
  const float norm = __builtin_sqrtf(sum_of_squares(x, width));
  const float below = norm < kNormFloor ? kNormFloor : norm;
  for (int64_t i = 0; i < width; ++i) x[i] /= below;
}

// The mapped q, k and v [width] of one head of a token.
inline void map_head(const FeatureParams& p, int64_t token, int64_t head, float* q, float* k,
                     float* __restrict v) {
  const float* cos = p.cos + token * p.pairs;
  const float* sin = p.sin + token * p.pairs;
  rotate(p.q.at(token, head), cos, sin, p.pairs, p.width, q);
  rotate(p.k.at(token, head), cos, sin, p.pairs, p.width, k);
  normalise(q, p.width);
  normalise(k, p.width);
  const float* value = p.v.at(token, head);
  const float below = (float)__builtin_pow((double)p.positions[token] + 1.0, p.sigma[head]);
  for (int64_t i = 0; i < p.width; ++i) v[i] = value[i] / below;
}

inline void features(const FeatureParams& p, int64_t token) {
  for (int64_t head = 0; head < p.heads; ++head) {
    const int64_t at = (token * p.heads + head) * p.width;
    map_head(p, token, head, p.q_out + at, p.k_out + at, p.v_out + at);
  }
}

inline float sum_of(const float* x, int64_t width) {
  Lanes total = broadcast(0.0f);
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) total = add(total, load(x + j));
  float rest[kLanes] = {};
  for (int64_t i = j; i < width; ++i) rest[i - j] = x[i];
  return sum(add(total, load(rest)));
}

// (x - mean) / sqrt(variance + epsilon) × weight + bias, along a row.
inline void layer_norm(const NormParams& p, int64_t row) {
  const float* x = p.x + row * p.x_stride;
  float* __restrict out = p.out + row * p.columns;
  const float mean = sum_of(x, p.columns) / (float)p.columns;
  for (int64_t i = 0; i < p.columns; ++i) out[i] = x[i] - mean;
  const float variance = sum_of_squares(out, p.columns) / (float)p.columns;
  const float scale = 1.0f / __builtin_sqrtf(variance + p.epsilon);
  for (int64_t i = 0; i < p.columns; ++i)
    out[i] = multiply_add(out[i] * scale, p.weight[i], p.bias[i]);
}

// e^x to about one unit in the last place; infinite above 88.4, e^-87 below -87.
inline float exponential(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 × 2^23: adding it rounds to an integer
  x = x > 89.0f ? 89.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = multiply_add(x, 1.44269504f, kShift);
  const float n = shifted - kShift;
  float r = multiply_add(n, -0.693359375f, x);  // ln 2 in two parts; the first times n is exact
  r = multiply_add(n, 2.12194440e-4f, r);
  float y = 1.0f / 5040.0f;
  y = multiply_add(y, r, 1.0f / 720.0f);
  y = multiply_add(y, r, 1.0f / 120.0f);
  y = multiply_add(y, r, 1.0f / 24.0f);
  y = multiply_add(y, r, 1.0f / 6.0f);
  y = multiply_add(y, r, 0.5f);
  y = multiply_add(y, r, 1.0f);
  y = multiply_add(y, r, 1.0f);
  const float power = __builtin_bit_cast(float, (uint32_t)((int32_t)n + 127) << 23);
  return y * power;
}

// 0.5 x (1 + tanh u) = x / (1 + e^{-2u}), u = sqrt(2/π) (x + 0.044715 x³).
inline void gelu_of(const float* x, int64_t count, float* __restrict out) {
  constexpr float kMinusTwoRoot = -1.5957691216f;
  for (int64_t i = 0; i < count; ++i) {
    const float cubed = x[i] * x[i] * x[i];
    const float u = multiply_add(cubed, 0.044715f, x[i]);
    out[i] = x[i] / (1.0f + exponential(kMinusTwoRoot * u));
  }
}

inline void gelu(const RowsParams& p, int64_t row) {
  gelu_of(p.x + row * p.x_stride, p.columns, p.out + row * p.out_stride);
}

// x Φ(x), Φ(x) = erfc(−x / √2) / 2. For y = |x| / √2, erfc(y) = p(1 / (1 + c y)) e^{−y²} to 1.5e-7
// (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26).
inline void gelu_erf(const RowsParams& p, int64_t row) {
  const float* x = p.x + row * p.x_stride;
  float* __restrict out = p.out + row * p.out_stride;
  for (int64_t i = 0; i < p.columns; ++i) {
    const float y = (x[i] < 0.0f ? -x[i] : x[i]) * 0.70710678f;
    const float t = 1.0f / multiply_add(0.3275911f, y, 1.0f);
    float series = 1.061405429f;
    series = multiply_add(series, t, -1.453152027f);
    series = multiply_add(series, t, 1.421413741f);
    series = multiply_add(series, t, -0.284496736f);
    series = multiply_add(series, t, 0.254829592f);
    const float above = 0.5f * series * t * exponential(-y * y);  // Φ(−|x|)
    out[i] = x[i] * (x[i] < 0.0f ? above : 1.0f - above);
  }
}

// elu(x) + 1: x + 1 for x >= 0, e^x below.
inline void elu_plus_one(const RowsParams& p, int64_t row) {
  const float* x = p.x + row * p.x_stride;
  float* __restrict out = p.out + row * p.out_stride;
  for (int64_t i = 0; i < p.columns; ++i) {
    const float below = exponential(x[i]);
    out[i] = x[i] < 0.0f ? below : x[i] + 1.0f;
  }
}

}  // namespace cottention::COTTENTION_ISA
