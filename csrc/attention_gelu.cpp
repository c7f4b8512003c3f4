// cottention_mix on the CPU: the checks and the call.
//
// Owns no arithmetic. joined [N, 3C + inner] is a layer's first product: q, k, v and the MLP's
// input side by side. positions int64 [N], from 0; sigma float64 [H]; cos, sin [N, R / 2]; state
// [S, H, D, D] with a free first stride, changed in place, C = H D; slots int32 [B]; offsets int32
// [B + 1] or none. Fills out [N, C + inner], the second product's input, as cottention_features,
// recurrent_step and gelu_new would, bit for bit.
#include <torch/csrc/stable/ops.h>

#include "features.h"
#include "ops.h"
#include "pool.h"

namespace cottention {
namespace {

void check_rooms(const Tensor& joined, const Tensor& sigma, const Tensor& state,
                 const Tensor& out) {
  check_contiguous(joined, "joined", 2, ScalarType::Float);
  check_contiguous(out, "out", 2, ScalarType::Float);
  check_kind(state, "state", 4, ScalarType::Float);
  const int64_t heads = state.size(1), width = state.size(2);
  check_state(state, heads, width, width);
  check_widths(width, width);
  check_sigma(sigma, heads);
  STD_TORCH_CHECK(joined.size(1) >= 3 * heads * width, "joined has no room for q, k and v");
  check_size(out, "out", 0, joined.size(0));
  check_size(out, "out", 1, joined.size(1) - 2 * heads * width);
}

// q, k and v side by side in a row of `joined`.
FeatureParams features(const Tensor& joined, const Tensor& positions, const Tensor& sigma,
                       const Tensor& cos, const Tensor& sin, int64_t width) {
  const int64_t channels = sigma.size(0) * width, stride = joined.size(1);
  const float* q = joined.const_data_ptr<float>();
  const float *k = q + channels, *v = k + channels;
  return feature_params({q, stride, width}, {k, stride, width}, {v, stride, width}, positions,
                        sigma, cos, sin, width);
}

RowsParams gelu(const Tensor& joined, const Tensor& out, int64_t channels) {
  return {joined.const_data_ptr<float>() + 3 * channels, out.mutable_data_ptr<float>() + channels,
          joined.size(1) - 3 * channels, joined.size(1), out.size(1)};
}

}  // namespace

void cottention_mix(const Tensor& joined, const Tensor& positions, const Tensor& sigma,
                    const Tensor& cos, const Tensor& sin, const Tensor& state, const Tensor& slots,
                    const std::optional<Tensor>& offsets, const Tensor& out) {
  check_rooms(joined, sigma, state, out);
  const int64_t tokens = joined.size(0), heads = state.size(1), width = state.size(2);
  check_positions(positions, cos, sin, tokens, width);
  MixParams m{features(joined, positions, sigma, cos, sin, width),
              pool_params(state, slots, offsets, tokens), gelu(joined, out, heads * width)};
  m.recurrent.out = out.mutable_data_ptr<float>();
  m.recurrent.out_stride = out.size(1);
  if (tokens == 0 || heads == 0) return;
  const Kernels& table = kernels();
  for_each_head(m.recurrent, tokens, m.recurrent.shares(),
                [&](int64_t task) { table.mix(m, task); });
}

}  // namespace cottention
