// Checks and parameters of the Cottention feature map, shared by cottention_features and
// cottention_attention_gelu; the CUDA ops use the checks alone.
#pragma once

#include "checks.h"

namespace cottention {

// cos, sin [N, R / 2] rotate the first R of `width` channels.
inline void check_rotary(const Tensor& cos, const Tensor& sin, int64_t tokens, int64_t width,
                         const Device& device = DeviceType::CPU) {
  check_contiguous(cos, "cos", 2, ScalarType::Float, device);
  check_contiguous(sin, "sin", 2, ScalarType::Float, device);
  check_size(cos, "cos", 0, tokens);
  check_size(sin, "sin", 0, tokens);
  check_size(sin, "sin", 1, cos.size(1));
  STD_TORCH_CHECK(2 * cos.size(1) <= width, "rotary_dim ", 2 * cos.size(1), " exceeds the heads' ",
                  width);
}

// positions int64 [N], counted from 0.
inline void check_positions(const Tensor& positions, const Tensor& cos, const Tensor& sin,
                            int64_t tokens, int64_t width, const Device& device = DeviceType::CPU) {
  check_contiguous(positions, "positions", 1, ScalarType::Long, device);
  check_size(positions, "positions", 0, tokens);
  check_rotary(cos, sin, tokens, width, device);
}

inline void check_sigma(const Tensor& sigma, int64_t heads,
                        const Device& device = DeviceType::CPU) {
  check_contiguous(sigma, "sigma", 1, ScalarType::Double, device);
  check_size(sigma, "sigma", 0, heads);
}

// Everything but the outputs, which the caller fills in.
inline FeatureParams feature_params(const HeadView& q, const HeadView& k, const HeadView& v,
                                    const Tensor& positions, const Tensor& sigma, const Tensor& cos,
                                    const Tensor& sin, int64_t width) {
  FeatureParams p{q, k, v};
  p.positions = positions.const_data_ptr<int64_t>();
  p.sigma = sigma.const_data_ptr<double>();
  p.cos = cos.const_data_ptr<float>();
  p.sin = sin.const_data_ptr<float>();
  p.heads = sigma.size(0);
  p.width = width;
  p.pairs = cos.size(1);
  return p;
}

}  // namespace cottention
