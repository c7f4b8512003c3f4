// cottention_layers on the CPU: all blocks of a model, each its norm, its two products and the mixer
// between them, one after the other.
//
// Owns the order alone: every block is the four ops that it calls, bit for bit. One call for all of
// them, since a caller in Python would wait for the interpreter's lock between any two. x [N, C] is
// changed in place; weights are kWeightsPerLayer tensors for each block; state [S, L, H, D, D], its
// rows changed in place; normed [N, C], joined [N, 3C + inner] and mixed [N, C + inner] are
// overwritten; the rest as in cottention_mix.
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "ops.h"

namespace cottention {
namespace {

constexpr int64_t kWeightsPerLayer = 7;

}  // namespace

void cottention_layers(const Tensor& x, const std::vector<Tensor>& weights, double epsilon,
                       const Tensor& positions, const Tensor& cos, const Tensor& sin,
                       const Tensor& state, const Tensor& slots,
                       const std::optional<Tensor>& offsets, const Tensor& normed,
                       const Tensor& joined, const Tensor& mixed) {
  check_kind(state, "state", 5, ScalarType::Float);
  const int64_t layers = state.size(1), given = weights.size();
  STD_TORCH_CHECK(given == layers * kWeightsPerLayer, "weights has ", given, " tensors for ",
                  layers, " layers of ", kWeightsPerLayer);
  for (int64_t layer = 0; layer < layers; ++layer) {
    const Tensor* w = &weights[layer * kWeightsPerLayer];
    layer_norm(x, w[0], w[1], epsilon, normed);
    linear_out(normed, w[2], w[3], joined);
    cottention_mix(joined, positions, w[4], cos, sin, torch::stable::select(state, 1, layer), slots,
                   offsets, mixed);
    linear_add(mixed, w[5], w[6], x);
  }
}

}  // namespace cottention
