// selective_scan on the CPU: checks and call.
//
// u, delta [N, C] and k, q [N, K], rows any distance apart; log_decay [C, K]; state [S, C, K] with a
// free first stride, updated in place; state_indices int32 [B]; cu_seqlens int32 [B + 1] or none.
// Returns [N, C].
#include <torch/csrc/stable/ops.h>

#include "ops.h"
#include "pool.h"

namespace cottention {
namespace {

constexpr int64_t kScannedPerThread = 16384;  // elements of states, each with an exponential

void check_matrix(const Tensor& x, const char* name, int64_t rows, int64_t columns) {
  check_rows(x, name, 2);
  check_size(x, name, 0, rows);
  check_size(x, name, 1, columns);
}

}  // namespace

Tensor selective_scan(const Tensor& u, const Tensor& delta, const Tensor& log_decay,
                      const Tensor& k, const Tensor& q, const Tensor& state,
                      const Tensor& state_indices, const std::optional<Tensor>& cu_seqlens) {
  check_rows(u, "u", 2);
  check_contiguous(log_decay, "log_decay", 2, ScalarType::Float);
  const int64_t tokens = u.size(0), channels = u.size(1), width = log_decay.size(1);
  check_matrix(delta, "delta", tokens, channels);
  check_matrix(k, "k", tokens, width);
  check_matrix(q, "q", tokens, width);
  check_size(log_decay, "log_decay", 0, channels);
  check_tensor(state, "state", 3, ScalarType::Float);
  check_size(state, "state", 1, channels);
  check_size(state, "state", 2, width);
  check_pool(state, "state");
  check_state_indices(state_indices, state.size(0));
  check_cu_seqlens(cu_seqlens, state_indices.size(0), tokens);
  Tensor out = torch::stable::new_empty(u, {tokens, channels});
  SelectiveScanParams p{};
  p.u = u.const_data_ptr<float>();
  p.delta = delta.const_data_ptr<float>();
  p.log_decay = log_decay.const_data_ptr<float>();
  p.k = k.const_data_ptr<float>();
  p.q = q.const_data_ptr<float>();
  p.state = state.mutable_data_ptr<float>();
  p.out = out.mutable_data_ptr<float>();
  p.state_indices = state_indices.const_data_ptr<int32_t>();
  p.cu_seqlens = cu_seqlens ? cu_seqlens->const_data_ptr<int32_t>() : nullptr;
  p.u_stride = u.stride(0);
  p.delta_stride = delta.stride(0);
  p.k_stride = k.stride(0);
  p.q_stride = q.stride(0);
  p.state_stride = state.stride(0);
  p.channels = channels;
  p.width = width;
  const int64_t segments = state_indices.size(0);
  const int64_t work = ceil_div(tokens, std::max<int64_t>(1, segments)) * kScanChannels * width;
  const Kernels& table = kernels();
  for_each_task(segments * p.splits(), kScannedPerThread / std::max<int64_t>(1, work),
                [&](int64_t task) { table.selective_scan(p, task); });
  return out;
}

}  // namespace cottention
