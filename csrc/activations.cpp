// silu, sigmoid, softplus, tanh, exp, rms_norm and short_convolution on the CPU: checks and calls.
// The arithmetic is in activations.h.
#include <torch/csrc/stable/ops.h>

#include "ops.h"
#include "pool.h"

namespace cottention {
namespace {

constexpr int64_t kActivationsPerThread = 65536;
constexpr int64_t kNormsPerThread = 65536;

Tensor each_element(const Tensor& x, void (*kernel)(const RowsParams&, int64_t)) {
  check_rows(x, "x", 2);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  const RowsParams p{x.const_data_ptr<float>(), out.mutable_data_ptr<float>(), x.size(1),
                     x.stride(0), x.size(1)};
  for_each_task(x.size(0), kActivationsPerThread / std::max<int64_t>(1, x.size(1)),
                [&](int64_t row) { kernel(p, row); });
  return out;
}

}  // namespace

// x [N, C], rows any distance apart → contiguous [N, C].
Tensor silu(const Tensor& x) { return each_element(x, kernels().silu); }

Tensor sigmoid(const Tensor& x) { return each_element(x, kernels().sigmoid); }

Tensor softplus(const Tensor& x) { return each_element(x, kernels().softplus); }

Tensor tanh(const Tensor& x) { return each_element(x, kernels().tanh); }

Tensor exp(const Tensor& x) { return each_element(x, kernels().exp); }

// x [N, C], rows any distance apart; weight [C]; `groups` divides C → contiguous [N, C].
Tensor rms_norm(const Tensor& x, const Tensor& weight, double epsilon, int64_t groups) {
  check_rows(x, "x", 2);
  check_contiguous(weight, "weight", 1, ScalarType::Float);
  check_size(weight, "weight", 0, x.size(1));
  STD_TORCH_CHECK(groups > 0 && x.size(1) % groups == 0, "x.size(1) must be a multiple of ", groups,
                  " groups, not ", x.size(1));
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  RMSNormParams p{x.const_data_ptr<float>(), weight.const_data_ptr<float>(),
                  out.mutable_data_ptr<float>()};
  p.columns = x.size(1);
  p.x_stride = x.stride(0);
  p.groups = groups;
  p.epsilon = static_cast<float>(epsilon);
  const Kernels& table = kernels();
  for_each_task(x.size(0), kNormsPerThread / std::max<int64_t>(1, x.size(1)),
                [&](int64_t row) { table.rms_norm(p, row); });
  return out;
}

// x [N, C], rows any distance apart; weight [W, C]; bias [C] or none; tails [S, W - 1, C], rows any
// distance apart, changed in place → contiguous [N, C].
Tensor short_convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                         const Tensor& tails, const Tensor& state_indices,
                         const std::optional<Tensor>& cu_seqlens) {
  check_rows(x, "x", 2);
  check_contiguous(weight, "weight", 2, ScalarType::Float);
  check_size(weight, "weight", 1, x.size(1));
  STD_TORCH_CHECK(weight.size(0) > 0, "weight must have at least one row");
  if (bias) {
    check_contiguous(*bias, "bias", 1, ScalarType::Float);
    check_size(*bias, "bias", 0, x.size(1));
  }
  check_tensor(tails, "tails", 3, ScalarType::Float);
  check_size(tails, "tails", 1, weight.size(0) - 1);
  check_size(tails, "tails", 2, x.size(1));
  check_pool(tails, "tails");
  check_state_indices(state_indices, tails.size(0));
  check_cu_seqlens(cu_seqlens, state_indices.size(0), x.size(0));
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  ShortConvolutionParams p{};
  p.x = x.const_data_ptr<float>();
  p.weight = weight.const_data_ptr<float>();
  p.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  p.tails = tails.mutable_data_ptr<float>();
  p.out = out.mutable_data_ptr<float>();
  p.state_indices = state_indices.const_data_ptr<int32_t>();
  p.cu_seqlens = cu_seqlens ? cu_seqlens->const_data_ptr<int32_t>() : nullptr;
  p.x_stride = x.stride(0);
  p.tail_stride = tails.stride(0);
  p.channels = x.size(1);
  p.width = weight.size(0);
  const int64_t segments = state_indices.size(0);
  const int64_t work = ceil_div(x.size(0), std::max<int64_t>(1, segments)) * kConvolutionChannels;
  const Kernels& table = kernels();
  for_each_task(segments * p.splits(), kActivationsPerThread / std::max<int64_t>(1, work * p.width),
                [&](int64_t task) { table.short_convolution(p, task); });
  return out;
}

}  // namespace cottention
