// recurrent_step and cottention_attention_gelu on CUDA: checks and calls.
//
// Arguments and shapes are those of the CPU ops; q, k and v, and the joined and out of
// cottention_attention_gelu, may be float32, bfloat16 or float16, all of one type.
#include <torch/csrc/stable/library.h>

#include "../features.h"
#include "arguments.h"

namespace cottention::cuda {
namespace {

Tensor recurrent_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state,
                      const std::optional<Tensor>& z, const Tensor& state_indices,
                      const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& w,
                      const std::optional<Tensor>& a, const std::optional<Tensor>& b) {
  const Type type = type_of(q, "q");
  const Device device = device_of(q);
  check_rows(q, "q", 3, q.scalar_type(), device);
  check_rows(k, "k", 3, q.scalar_type(), device);
  check_rows(v, "v", 3, q.scalar_type(), device);
  for (int64_t dim = 0; dim < 3; ++dim) check_size(k, "k", dim, q.size(dim));
  for (int64_t dim = 0; dim < 2; ++dim) check_size(v, "v", dim, q.size(dim));
  const int64_t tokens = q.size(0), heads = q.size(1), key = q.size(2), value = v.size(2);
  check_widths(key, value);
  check_pools(state, z, heads, value, key, device);
  check_segments(state_indices, cu_seqlens, tokens, device);
  check_terms(q, w, a, b, z.has_value(), device);
  Tensor out = torch::stable::new_empty(v, {tokens, heads, value});
  if (tokens == 0 || heads == 0) return out;
  StepParams p = step_params(state, z, state_indices, cu_seqlens, tokens);
  p.q = view_of(q);
  p.k = view_of(k);
  p.v = view_of(v);
  p.out = out.data_ptr();
  p.out_stride = heads * value;
  const int64_t bytes = bytes_of(type);
  p.is_aligned = is_aligned(q.data_ptr(), bytes, q.stride(0), q.stride(1)) &&
                 is_aligned(k.data_ptr(), bytes, k.stride(0), k.stride(1));
  set_terms(p, w, a, b);
  const DeviceGuard guard(device.index());
  check_launch(launch_step(p, type, type, current_stream(device)));
  return out;
}

void check_shapes(const Tensor& joined, const Tensor& state, const Tensor& out,
                  const Device& device) {
  check_contiguous(joined, "joined", 2, joined.scalar_type(), device);
  check_contiguous(out, "out", 2, joined.scalar_type(), device);
  STD_TORCH_CHECK(state.dim() == 4, "state must have 4 dimensions, not ", state.dim());
  const int64_t heads = state.size(1), width = state.size(2);
  check_pools(state, std::nullopt, heads, width, width, device);
  check_fused_width(width);
  STD_TORCH_CHECK(joined.size(1) >= 3 * heads * width, "joined is too narrow for q, k and v");
  check_size(out, "out", 0, joined.size(0));
  check_size(out, "out", 1, joined.size(1) - 2 * heads * width);
}

FeaturesGeluParams features_gelu_params(const Tensor& joined, const Tensor& positions,
                                        const Tensor& sigma, const Tensor& cos, const Tensor& sin,
                                        const Tensor& out, int64_t width) {
  const int64_t heads = sigma.size(0), channels = heads * width, stride = joined.size(1);
  const int64_t bytes = bytes_of(type_of(joined, "joined"));
  const char* x = static_cast<const char*>(joined.data_ptr());
  FeaturesGeluParams m{{x, stride, width},
                       {x + channels * bytes, stride, width},
                       {x + 2 * channels * bytes, stride, width}};
  m.positions = static_cast<const int64_t*>(positions.data_ptr());
  m.sigma = static_cast<const double*>(sigma.data_ptr());
  m.cos = static_cast<const float*>(cos.data_ptr());
  m.sin = static_cast<const float*>(sin.data_ptr());
  m.up = x + 3 * channels * bytes;
  m.up_stride = stride;
  m.gelu = static_cast<char*>(out.data_ptr()) + channels * bytes;
  m.gelu_stride = out.size(1);
  m.tokens = joined.size(0);
  m.heads = static_cast<int>(heads);
  m.width = static_cast<int>(width);
  m.pairs = static_cast<int>(cos.size(1));
  m.inner = static_cast<int>(stride - 3 * channels);
  m.is_aligned = is_aligned(m.up, bytes, m.up_stride) && is_aligned(m.gelu, bytes, m.gelu_stride);
  return m;
}

// Two kernels: the first maps q, k and v into a temporary buffer and computes gelu; then the step.
void cottention_attention_gelu(const Tensor& joined, const Tensor& positions, const Tensor& sigma,
                               const Tensor& cos, const Tensor& sin, const Tensor& state,
                               const Tensor& state_indices, const std::optional<Tensor>& cu_seqlens,
                               const Tensor& out) {
  const Type type = type_of(joined, "joined");
  const Device device = device_of(joined);
  check_shapes(joined, state, out, device);
  const int64_t tokens = joined.size(0), heads = state.size(1), width = state.size(2);
  check_positions(positions, cos, sin, tokens, width, device);
  check_sigma(sigma, heads, device);
  check_segments(state_indices, cu_seqlens, tokens, device);
  if (tokens == 0 || heads == 0) return;
  const Tensor mapped = torch::stable::new_empty(state, {3, tokens, heads, width});
  FeaturesGeluParams m = features_gelu_params(joined, positions, sigma, cos, sin, out, width);
  m.q_out = static_cast<float*>(mapped.data_ptr());
  m.k_out = m.q_out + tokens * heads * width;
  m.v_out = m.k_out + tokens * heads * width;
  StepParams p = step_params(state, std::nullopt, state_indices, cu_seqlens, tokens);
  p.q = {m.q_out, heads * width, width};
  p.k = {m.k_out, heads * width, width};
  p.v = {m.v_out, heads * width, width};
  p.out = out.data_ptr();
  p.out_stride = out.size(1);
  p.is_aligned = true;
  const DeviceGuard guard(device.index());
  void* stream = current_stream(device);
  check_launch(launch_features_gelu(m, type, stream));
  check_launch(launch_step(p, Type::kFloat, type, stream));
}

}  // namespace
}  // namespace cottention::cuda

STABLE_TORCH_LIBRARY_IMPL(cottention, CUDA, m) {
  m.impl("recurrent_step", TORCH_BOX(&cottention::cuda::recurrent_step));
  m.impl("cottention_attention_gelu", TORCH_BOX(&cottention::cuda::cottention_attention_gelu));
}
