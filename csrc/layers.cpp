// cottention_layers on the CPU: all blocks of a model in one call.
//
// Calls the four ops of each block in turn (layer_norm, linear_out, cottention_attention_gelu,
// linear_add), so the bits are the same. One call from Python, because each call would otherwise
// wait for the interpreter lock. x [N, C] is updated in place; weights has kWeightsPerLayer tensors
// for each block; state [S, L, H, D, D] is updated in place; normed [N, C], joined [N, 3C + inner]
// and attn_gelu [N, C + inner] are scratch buffers; the rest as in cottention_attention_gelu.
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "ops.h"
#include "parallel.h"

namespace cottention {
namespace {

constexpr int64_t kWeightsPerLayer = 7;

}  // namespace

void cottention_layers(const Tensor& x, const std::vector<Tensor>& weights, double epsilon,
                       const Tensor& positions, const Tensor& cos, const Tensor& sin,
                       const Tensor& state, const Tensor& state_indices,
                       const std::optional<Tensor>& cu_seqlens, const Tensor& normed,
                       const Tensor& joined, const Tensor& attn_gelu) {
  check_tensor(state, "state", 5, ScalarType::Float);
  const int64_t layers = state.size(1), given = weights.size();
  STD_TORCH_CHECK(given == layers * kWeightsPerLayer, "weights has ", given, " tensors for ",
                  layers, " layers of ", kWeightsPerLayer);
  with_team(x.size(0) * joined.size(1) * normed.size(1) > kProductsPerThread, [&] {
    for (int64_t layer = 0; layer < layers; ++layer) {
      const Tensor* w = &weights[layer * kWeightsPerLayer];
      layer_norm(x, w[0], w[1], epsilon, normed);
      linear_out(normed, w[2], w[3], joined);
      cottention_attention_gelu(joined, positions, w[4], cos, sin,
                                torch::stable::select(state, 1, layer), state_indices, cu_seqlens,
                                attn_gelu);
      linear_add(attn_gelu, w[5], w[6], x);
    }
  });
}

}  // namespace cottention
