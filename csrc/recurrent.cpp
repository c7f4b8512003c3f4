// recurrent_step on the CPU: checks and calls.
//
// q, k [N, H, K] and v [N, H, V], of one type (float32, bfloat16 or float16), last dimension
// contiguous; state [S, H, V, K] and z [S, H, K], float32 with a free first stride, updated in
// place; state_indices int32 [B]; cu_seqlens int32 [B + 1] or none; w [N, H] or [N, H, K] or none,
// a, b [N, H, K] or none, float32, last dimension contiguous. Returns [N, H, V] in the type of v.
#include <torch/csrc/stable/ops.h>

#include "ops.h"
#include "pool.h"

namespace cottention {
namespace {

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_input_type(q, "q");
  check_rows(q, "q", 3, q.scalar_type());
  check_rows(k, "k", 3, q.scalar_type());
  check_rows(v, "v", 3, q.scalar_type());
  for (int64_t dim = 0; dim < 3; ++dim) check_size(k, "k", dim, q.size(dim));
  for (int64_t dim = 0; dim < 2; ++dim) check_size(v, "v", dim, q.size(dim));
  check_widths(q.size(2), v.size(2));
}

// w, a and b: what has them, checked against q.
void set_terms(RecurrentParams& p, const Tensor& q, const std::optional<Tensor>& w,
               const std::optional<Tensor>& a, const std::optional<Tensor>& b) {
  check_terms(q, w, a, b, p.z != nullptr);
  p.decay = !w ? Decay::kNone : w->dim() == 2 ? Decay::kPerHead : Decay::kPerKey;
  if (w) p.w = head_view(*w);
  p.has_term = a.has_value();
  if (a) p.a = head_view(*a);
  if (b) p.b = head_view(*b);
}

Tensor widened(const Tensor& x) { return torch::stable::to(x, ScalarType::Float); }

void run(const RecurrentParams& p, int64_t tokens) {
  const Kernels& table = kernels();
  if (p.z) for_each_head(p, tokens, 1, [&](int64_t task) { table.denominators(p, task); });
  for_each_head(p, tokens, p.row_splits, [&](int64_t task) { table.recurrent(p, task); });
}

}  // namespace

Tensor recurrent_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state,
                      const std::optional<Tensor>& z, const Tensor& state_indices,
                      const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& w,
                      const std::optional<Tensor>& a, const std::optional<Tensor>& b) {
  check_inputs(q, k, v);
  if (q.scalar_type() != ScalarType::Float) {
    const Tensor out =
        recurrent_step(widened(q), widened(k), widened(v), state, z, state_indices, cu_seqlens, w,
                       a, b);
    return torch::stable::to(out, q.scalar_type());
  }
  const int64_t tokens = q.size(0), heads = q.size(1);
  check_state(state, heads, v.size(2), q.size(2));
  if (z) check_denominator(*z, state);
  const std::vector<int32_t> order = slot_order(state_indices);
  RecurrentParams p = pool_params(state, state_indices, cu_seqlens, tokens, order);
  p.z = z ? z->mutable_data_ptr<float>() : nullptr;
  p.z_stride = z ? z->stride(0) : 0;
  set_terms(p, q, w, a, b);
  Tensor out = torch::stable::new_empty(v, {tokens, heads, v.size(2)});
  if (tokens == 0 || heads == 0) return out;
  std::optional<Tensor> denominators;
  if (z) denominators = torch::stable::new_empty(v, {tokens, heads});
  p.q = head_view(q);
  p.k = head_view(k);
  p.v = head_view(v);
  p.out = out.mutable_data_ptr<float>();
  p.out_stride = heads * v.size(2);
  p.denominators = denominators ? denominators->mutable_data_ptr<float>() : nullptr;
  run(p, tokens);
  return out;
}

}  // namespace cottention
