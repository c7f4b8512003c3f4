// The rows of the pool that a batch runs on: what is asked of them, and how their work divides into
// tasks.
//
// Owns what recurrent_step and cottention_mix have in common. No arithmetic.
#pragma once

#include <optional>
#include <vector>

#include "checks.h"
#include "parallel.h"

namespace cottention {

constexpr int64_t kElementsPerThread = 16384;  // below this a thread costs more than it gives
constexpr int64_t kLongRuns = 4;  // a thread's share of a step, in stretches of memory

inline void check_widths(int64_t key, int64_t value) {
  STD_TORCH_CHECK(key >= 8 && key <= kMaxKeyWidth && key % 8 == 0, "key width ", key,
                  ": the kernel takes 8 to ", kMaxKeyWidth, " in multiples of 8");
  STD_TORCH_CHECK(value >= 8 && value <= kMaxValueWidth && value % 8 == 0, "value width ", value,
                  ": the kernel takes 8 to ", kMaxValueWidth, " in multiples of 8");
}

// A pool's rows may lie any distance apart, but not inside each other.
inline void check_pool(const Tensor& pool, const char* name) {
  int64_t expected = 1;
  for (int64_t dim = pool.dim() - 1; dim > 0; --dim) {
    STD_TORCH_CHECK(pool.size(dim) == 1 || pool.stride(dim) == expected, name,
                    " must be contiguous behind its first dimension");
    expected *= pool.size(dim);
  }
  STD_TORCH_CHECK(pool.size(0) <= 1 || pool.stride(0) >= expected, name, " has rows that overlap");
}

// state [S, H, V, K]
inline void check_state(const Tensor& state, int64_t heads, int64_t value, int64_t key,
                        const Device& device = DeviceType::CPU) {
  check_kind(state, "state", 4, ScalarType::Float, device);
  check_size(state, "state", 1, heads);
  check_size(state, "state", 2, value);
  check_size(state, "state", 3, key);
  check_pool(state, "state");
}

// z [S, H, K], beside a state that is as it should be.
inline void check_denominator(const Tensor& z, const Tensor& state,
                              const Device& device = DeviceType::CPU) {
  check_kind(z, "z", 3, ScalarType::Float, device);
  check_size(z, "z", 0, state.size(0));
  check_size(z, "z", 1, state.size(1));
  check_size(z, "z", 2, state.size(3));
  check_pool(z, "z");
}

inline void check_slots(const Tensor& slots, int64_t pool_size) {
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

inline void check_offsets(const std::optional<Tensor>& offsets, int64_t segments, int64_t tokens) {
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
inline int64_t share_rows(const RecurrentParams& p, int64_t tokens) {
  const int64_t heads = p.segments * p.heads;
  const int64_t elements = std::max(tokens, p.segments) * p.heads * p.value_width * p.key_width;
  const int64_t useful = std::min(2 * int64_t(torch::stable::get_num_threads()),
                                  ceil_div(elements, kElementsPerThread));
  const int64_t shares = std::max<int64_t>(1, ceil_div(useful, std::max<int64_t>(1, heads)));
  return std::min(ceil_div(ceil_div(p.value_width, shares), 8) * 8, p.value_width);
}

// The pool and the batch on it, checked; q, k, v, z and out are the caller's to fill in.
inline RecurrentParams pool_params(const Tensor& state, const Tensor& slots,
                                   const std::optional<Tensor>& offsets, int64_t tokens) {
  check_slots(slots, state.size(0));
  check_offsets(offsets, slots.size(0), tokens);
  RecurrentParams p{};
  p.state = state.mutable_data_ptr<float>();
  p.state_stride = state.stride(0);
  p.slots = slots.const_data_ptr<int32_t>();
  p.offsets = offsets ? offsets->const_data_ptr<int32_t>() : nullptr;
  p.segments = slots.size(0);
  p.heads = state.size(1);
  p.value_width = state.size(2);
  p.key_width = state.size(3);
  p.share_rows = share_rows(p, tokens);
  return p;
}

// Calls task(i) for every segment, head and, where `shares` says so, share of value rows. Segments
// of one token are tasks of one length.
template <class Task>
void for_each_head(const RecurrentParams& p, int64_t tokens, int64_t shares, const Task& task) {
  const int64_t count = p.segments * p.heads * shares;
  const int64_t rows = shares == 1 ? p.value_width : p.share_rows;
  const int64_t work = std::max<int64_t>(1, ceil_div(tokens, p.segments) * p.key_width * rows);
  const int64_t run = tokens <= p.segments ? even_run(count, kLongRuns) : 1;
  for_each_task(count, kElementsPerThread / work, run, task);
}

}  // namespace cottention
