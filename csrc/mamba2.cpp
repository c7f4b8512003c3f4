// mamba2_layers on the CPU: all blocks of a Mamba-2 model in one call, with the bits of the ops that
// engine/models/mamba/model.py calls one by one.
//
// x [N, C] is updated in place; weights has kWeights tensors for each block, in the order of
// `Weights`, a bias that is absent without elements; state [S, L, H, V, K] and conv [S, L, W - 1,
// H V + 2 G K] are updated in place; state_indices int32 [B]; cu_seqlens int32 [B + 1] or none.
#include <torch/csrc/stable/ops.h>

#include "ops.h"
#include "pool.h"

namespace cottention {
namespace {

enum Weights {
  kNorm,
  kIn,
  kInBias,
  kConvolution,      // [W, H V + 2 G K]
  kConvolutionBias,
  kStepBias,         // [H]
  kLogDecay,         // [H], negative
  kSkip,             // [H]
  kGatedNorm,        // [H V]
  kOut,
  kOutBias,
  kWeights
};

struct Sizes {
  int64_t tokens, heads, value, key, groups;

  int64_t inner() const { return heads * value; }
  int64_t convolved() const { return inner() + 2 * groups * key; }
};

std::optional<Tensor> bias_of(const Tensor& x) {
  return x.numel() ? std::optional<Tensor>(x) : std::nullopt;
}

const float* head_weight(const Tensor& x, const char* name, int64_t heads) {
  check_contiguous(x, name, 1, ScalarType::Float);
  check_size(x, name, 0, heads);
  return x.const_data_ptr<float>();
}

// joined [N, I + convolved + H]: gate, what was convolved, step; convolved [N, I + 2 G K]: x, the
// keys and the queries of all groups → [N, I].
Tensor heads(const Tensor& joined, const Tensor& convolved, const Tensor* w, const Sizes& n,
             const std::vector<double>& step_limit, const Tensor& state,
             const Tensor& state_indices, const std::optional<Tensor>& cu_seqlens) {
  const Tensor out = torch::stable::new_empty(joined, {n.tokens, n.inner()});
  const Tensor v = torch::stable::new_empty(joined, {n.tokens, n.inner()});
  const Tensor decay = torch::stable::new_empty(joined, {n.tokens, n.heads});
  const std::vector<int32_t> order = slot_order(state_indices);
  Mamba2HeadsParams p{pool_params(state, state_indices, cu_seqlens, n.tokens, order)};
  p.gate = joined.const_data_ptr<float>();
  p.step = p.gate + n.inner() + n.convolved();
  p.joined_stride = joined.stride(0);
  p.x = convolved.const_data_ptr<float>();
  p.x_stride = convolved.stride(0);
  p.v = v.mutable_data_ptr<float>();
  p.w = decay.mutable_data_ptr<float>();
  p.step_bias = head_weight(w[kStepBias], "dt_bias", n.heads);
  p.log_decay = head_weight(w[kLogDecay], "log_decay", n.heads);
  p.skip = head_weight(w[kSkip], "D", n.heads);
  p.groups = n.groups;
  p.least_step = static_cast<float>(step_limit[0]);
  p.greatest_step = static_cast<float>(step_limit[1]);
  RecurrentParams& s = p.recurrent;
  s.k = {p.x + n.inner(), p.x_stride, 0};
  s.q = {p.x + n.inner() + n.groups * n.key, p.x_stride, 0};
  s.v = {p.v, n.inner(), n.value};
  s.decay = Decay::kPerHead;
  s.w = {p.w, n.heads, 1};
  s.out = out.mutable_data_ptr<float>();
  s.out_stride = n.inner();
  split_rows(s, n.value);
  for_each_head(s, n.tokens, 1, [&](int64_t task) { kernels().mamba2_heads(p, task); });
  return out;
}

}  // namespace

void mamba2_layers(const Tensor& x, const std::vector<Tensor>& weights, double epsilon,
                   int64_t groups, const std::vector<double>& step_limit, const Tensor& state,
                   const Tensor& conv, const Tensor& state_indices,
                   const std::optional<Tensor>& cu_seqlens) {
  check_contiguous(x, "x", 2, ScalarType::Float);
  check_tensor(state, "state", 5, ScalarType::Float);
  check_tensor(conv, "conv", 4, ScalarType::Float);
  const int64_t layers = state.size(1), given = weights.size(), num_limits = step_limit.size();
  STD_TORCH_CHECK(given == layers * kWeights, "weights has ", given, " tensors for ", layers,
                  " layers of ", int64_t(kWeights));
  STD_TORCH_CHECK(num_limits == 2, "step_limit must be the least and the greatest step");
  const Sizes n{x.size(0), state.size(2), state.size(3), state.size(4), groups};
  STD_TORCH_CHECK(groups > 0 && n.heads % groups == 0, "the heads must be a multiple of ", groups,
                  " groups, not ", n.heads);
  check_widths(n.key, n.value);
  check_state(torch::stable::select(state, 1, 0), n.heads, n.value, n.key);
  check_size(conv, "conv", 0, state.size(0));
  check_size(conv, "conv", 1, layers);
  check_size(conv, "conv", 3, n.convolved());
  check_pool(conv, "conv");
  check_pool(state, "state");
  check_state_indices(state_indices, state.size(0));
  check_cu_seqlens(cu_seqlens, state_indices.size(0), n.tokens);
  if (n.tokens == 0) return;
  with_team(n.tokens * x.size(1) * n.inner() > kProductsPerThread, [&] {
    for (int64_t layer = 0; layer < layers; ++layer) {
      const Tensor* w = &weights[layer * kWeights];
      const Tensor joined = linear(rms_norm(x, w[kNorm], epsilon, 1), w[kIn], bias_of(w[kInBias]),
                                   n.inner() + n.convolved() + n.heads);
      Tensor whole = joined;  // narrow takes a reference that is not const
      const Tensor middle = torch::stable::narrow(whole, 1, n.inner(), n.convolved());
      const Tensor convolved =
          silu(short_convolution(middle, w[kConvolution], bias_of(w[kConvolutionBias]),
                                 torch::stable::select(conv, 1, layer), state_indices, cu_seqlens));
      const Tensor out = heads(joined, convolved, w, n, step_limit,
                               torch::stable::select(state, 1, layer), state_indices, cu_seqlens);
      linear_add(rms_norm(out, w[kGatedNorm], epsilon, groups), w[kOut], bias_of(w[kOutBias]), x);
    }
  });
}

}  // namespace cottention
