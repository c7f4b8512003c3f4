// The product of fixed order on the CPU: packing of weights, checks, the call.
//
// Owns the packed layout [panels, C, 64]: panel i holds output columns 64 i to 64 i + 63 side by
// side for each channel, zeros behind the last column. Owns no arithmetic.
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "ops.h"
#include "parallel.h"

namespace cottention {
namespace {

constexpr int64_t kProductsPerThread = 131072;
constexpr int64_t kPackedAtOnce = 16;  // channels: one cache line of each of a panel's 64 rows

void pack_panel(const float* weight, int64_t stride, int64_t columns, int64_t channels,
                float* panel) {
  for (int64_t c0 = 0; c0 < channels; c0 += kPackedAtOnce) {
    const int64_t end = std::min(c0 + kPackedAtOnce, channels);
    for (int64_t j = 0; j < kPanel; ++j)
      for (int64_t c = c0; c < end; ++c)
        panel[c * kPanel + j] = j < columns ? weight[j * stride + c] : 0.0f;
  }
}

}  // namespace

// weight [out_features, C] → [ceil(out_features / 64), C, 64].
Tensor pack_weight(const Tensor& weight) {
  check_rows(weight, "weight", 2);
  const int64_t columns = weight.size(0), channels = weight.size(1), stride = weight.stride(0);
  const int64_t panels = ceil_div(columns, kPanel);
  Tensor packed = torch::stable::new_empty(weight, {panels, channels, kPanel});
  const float* from = weight.const_data_ptr<float>();
  float* to = packed.mutable_data_ptr<float>();
  for_each_task(panels, 1, [&](int64_t i) {
    pack_panel(from + i * kPanel * stride, stride, std::min(kPanel, columns - i * kPanel), channels,
               to + i * kPanel * channels);
  });
  return packed;
}

// x [N, C] (rows any distance apart), packed, bias [out_features] or none → [N, out_features].
Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
              int64_t out_features) {
  check_rows(x, "x", 2);
  check_contiguous(packed, "packed", 3, ScalarType::Float);
  check_size(packed, "packed", 0, ceil_div(out_features, kPanel));
  check_size(packed, "packed", 1, x.size(1));
  check_size(packed, "packed", 2, kPanel);
  if (bias) {
    check_contiguous(*bias, "bias", 1, ScalarType::Float);
    check_size(*bias, "bias", 0, out_features);
  }
  Tensor out = torch::stable::new_empty(x, {x.size(0), out_features});
  LinearParams p{x.const_data_ptr<float>(), packed.const_data_ptr<float>()};
  p.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  p.out = out.mutable_data_ptr<float>();
  p.rows = x.size(0);
  p.channels = x.size(1);
  p.columns = out_features;
  p.x_stride = x.stride(0);
  const int64_t tasks = ceil_div(p.rows, kTaskRows) * p.panels();
  const int64_t products = std::max<int64_t>(1, std::min(p.rows, kTaskRows) * kPanel * p.channels);
  const Kernels& table = kernels();
  for_each_task(tasks, kProductsPerThread / products,
                [&](int64_t task) { table.linear(p, task); });
  return out;
}

}  // namespace cottention
