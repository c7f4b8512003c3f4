// recurrent_step on the CPU: the checks, the division into tasks, the call.
//
// Owns no arithmetic. q, k [N, H, K] and v [N, H, V] with free strides but the last; state
// [S, H, V, K] and z [S, H, K] with a free first stride, changed in place; slots int32 [B];
// offsets int32 [B + 1] or none; returns [N, H, V].
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "checks.h"
#include "ops.h"
#include "parallel.h"

namespace cottention {
namespace {

constexpr int64_t kElementsPerThread = 16384;  // below this a thread costs more than it gives

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_rows(q, "q", 3);
  check_rows(k, "k", 3);
  check_rows(v, "v", 3);
  for (int64_t dim = 0; dim < 3; ++dim) check_size(k, "k", dim, q.size(dim));
  for (int64_t dim = 0; dim < 2; ++dim) check_size(v, "v", dim, q.size(dim));
  const int64_t key = q.size(2), value = v.size(2);
  STD_TORCH_CHECK(key >= 8 && key <= 512 && key % 8 == 0, "key width ", key,
                  ": the kernel takes 8 to 512 in multiples of 8");
  STD_TORCH_CHECK(value >= 8 && value <= 256 && value % 8 == 0, "value width ", value,
                  ": the kernel takes 8 to 256 in multiples of 8");
}

// A pool's rows may lie any distance apart, but not inside each other.
void check_pool(const Tensor& pool, const char* name) {
  int64_t expected = 1;
  for (int64_t dim = pool.dim() - 1; dim > 0; --dim) {
    STD_TORCH_CHECK(pool.size(dim) == 1 || pool.stride(dim) == expected, name,
                    " must be contiguous behind its first dimension");
    expected *= pool.size(dim);
  }
  STD_TORCH_CHECK(pool.size(0) <= 1 || pool.stride(0) >= expected, name, " has rows that overlap");
}

void check_state(const Tensor& q, const Tensor& v, const Tensor& state,
                 const std::optional<Tensor>& z) {
  check_kind(state, "state", 4, ScalarType::Float);
  check_size(state, "state", 1, q.size(1));
  check_size(state, "state", 2, v.size(2));
  check_size(state, "state", 3, q.size(2));
  check_pool(state, "state");
  if (!z) return;
  check_kind(*z, "z", 3, ScalarType::Float);
  check_size(*z, "z", 0, state.size(0));
  check_size(*z, "z", 1, q.size(1));
  check_size(*z, "z", 2, q.size(2));
  check_pool(*z, "z");
}

void check_slots(const Tensor& slots, int64_t pool_size) {
  check_contiguous(slots, "slots", 1, ScalarType::Int);
  const int32_t* slot = slots.const_data_ptr<int32_t>();
  std::vector<bool> named(pool_size);
  for (int64_t i = 0; i < slots.size(0); ++i) {
    if (slot[i] == kPaddingSlot) continue;
    STD_TORCH_CHECK(slot[i] >= 0 && slot[i] < pool_size, "slot ", slot[i],
                    " is out of range for a pool of ", pool_size);
    STD_TORCH_CHECK(!named[slot[i]], "slot ", slot[i], " is named twice");
    named[slot[i]] = true;
  }
}

void check_offsets(const std::optional<Tensor>& offsets, int64_t segments, int64_t tokens) {
  if (!offsets) {
    STD_TORCH_CHECK(segments == tokens, "without offsets there must be one slot per token: ",
                    segments, " slots, ", tokens, " tokens");
    return;
  }
  check_contiguous(*offsets, "offsets", 1, ScalarType::Int);
  check_size(*offsets, "offsets", 0, segments + 1);
  const int32_t* at = offsets->const_data_ptr<int32_t>();
  STD_TORCH_CHECK(at[0] == 0 && at[segments] == tokens, "offsets must run from 0 to ", tokens);
  for (int64_t i = 0; i < segments; ++i)
    STD_TORCH_CHECK(at[i] <= at[i + 1], "offsets must not fall");
}

// Value rows per task: all of a head, or fewer where threads would stand idle.
int64_t share_rows(int64_t segments, int64_t heads, int64_t value_width) {
  const int64_t tasks = 2 * int64_t(torch::stable::get_num_threads());
  const int64_t shares = ceil_div(tasks, std::max<int64_t>(1, segments * heads));
  return std::min(ceil_div(ceil_div(value_width, shares), 8) * 8, value_width);
}

void run(const RecurrentParams& p, int64_t tokens) {
  const Kernels& table = kernels();
  const int64_t work = std::max<int64_t>(1, ceil_div(tokens, p.segments) * p.key_width);
  const int64_t heads = p.segments * p.heads, shares = heads * p.shares();
  const bool is_even = tokens <= p.segments;
  if (p.z)
    for_each_task(heads, kElementsPerThread / work, is_even ? even_run(heads) : 1,
                  [&](int64_t task) { table.denominators(p, task); });
  for_each_task(shares, kElementsPerThread / (work * p.share_rows), is_even ? even_run(shares) : 1,
                [&](int64_t task) { table.recurrent(p, task); });
}

}  // namespace

Tensor recurrent_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state,
                      const std::optional<Tensor>& z, const Tensor& slots,
                      const std::optional<Tensor>& offsets) {
  check_inputs(q, k, v);
  check_state(q, v, state, z);
  check_slots(slots, state.size(0));
  const int64_t tokens = q.size(0), heads = q.size(1), segments = slots.size(0);
  check_offsets(offsets, segments, tokens);
  Tensor out = torch::stable::new_empty(v, {tokens, heads, v.size(2)});
  if (tokens == 0 || heads == 0) return out;
  std::optional<Tensor> below;
  if (z) below = torch::stable::new_empty(v, {tokens, heads});
  RecurrentParams p{head_view(q), head_view(k), head_view(v)};
  p.state = state.mutable_data_ptr<float>();
  p.z = z ? z->mutable_data_ptr<float>() : nullptr;
  p.state_stride = state.stride(0);
  p.z_stride = z ? z->stride(0) : 0;
  p.out = out.mutable_data_ptr<float>();
  p.denominators = below ? below->mutable_data_ptr<float>() : nullptr;
  p.slots = slots.const_data_ptr<int32_t>();
  p.offsets = offsets ? offsets->const_data_ptr<int32_t>() : nullptr;
  p.segments = segments;
  p.heads = heads;
  p.key_width = q.size(2);
  p.value_width = v.size(2);
  p.share_rows = share_rows(segments, heads, p.value_width);
  run(p, tokens);
  return out;
}

}  // namespace cottention
