// cottention_attention_gelu on the CPU: checks and call.
//
// joined [N, 3C + inner] is the first product of a block: q, k, v and the MLP's input side by side.
// positions int64 [N], counted from 0; sigma float64 [H]; cos, sin [N, R / 2]; state [S, H, D, D],
// C = H D, updated in place; state_indices int32 [B]; cu_seqlens int32 [B + 1] or none. Writes out
// [N, C + inner], the input of the second product, with the bits of cottention_features,
// recurrent_step and gelu_new in turn.
#include <torch/csrc/stable/ops.h>

#include "features.h"
#include "ops.h"
#include "pool.h"

namespace cottention {
namespace {

void check_shapes(const Tensor& joined, const Tensor& sigma, const Tensor& state,
                  const Tensor& out) {
  check_contiguous(joined, "joined", 2, ScalarType::Float);
  check_contiguous(out, "out", 2, ScalarType::Float);
  check_tensor(state, "state", 4, ScalarType::Float);
  const int64_t heads = state.size(1), width = state.size(2);
  check_state(state, heads, width, width);
  check_fused_width(width);
  check_sigma(sigma, heads);
  STD_TORCH_CHECK(joined.size(1) >= 3 * heads * width, "joined is too narrow for q, k and v");
  check_size(out, "out", 0, joined.size(0));
  check_size(out, "out", 1, joined.size(1) - 2 * heads * width);
}

// Parameters of the feature map on q, k and v, which are side by side in a row of `joined`.
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

void cottention_attention_gelu(const Tensor& joined, const Tensor& positions, const Tensor& sigma,
                               const Tensor& cos, const Tensor& sin, const Tensor& state,
                               const Tensor& state_indices, const std::optional<Tensor>& cu_seqlens,
                               const Tensor& out) {
  check_shapes(joined, sigma, state, out);
  const int64_t tokens = joined.size(0), heads = state.size(1), width = state.size(2);
  check_positions(positions, cos, sin, tokens, width);
  const std::vector<int32_t> order = slot_order(state_indices);
  AttentionGeluParams m{features(joined, positions, sigma, cos, sin, width),
                        pool_params(state, state_indices, cu_seqlens, tokens, order),
                        gelu(joined, out, heads * width)};
  m.recurrent.out = out.mutable_data_ptr<float>();
  m.recurrent.out_stride = out.size(1);
  if (tokens == 0 || heads == 0) return;
  const Kernels& table = kernels();
  for_each_head(m.recurrent, tokens, m.recurrent.row_splits,
                [&](int64_t task) { table.attention_gelu(m, task); });
}

}  // namespace cottention
