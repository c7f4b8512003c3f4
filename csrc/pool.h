// Checks of the state pool and of a batch on it, and the split of their work into tasks; shared by
// recurrent_step and cottention_attention_gelu.
#pragma once

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "checks.h"
#include "parallel.h"

namespace cottention {

constexpr int64_t kStepChunksPerThread = 4;

// Below this, another thread costs more than it saves. One of a team is awake; to wake one of torch's
// takes 2 microseconds if its core shares the caches, 8 if it does not, and the elements 4.
inline int64_t elements_per_thread() { return Team::of_this_thread() ? 16384 : 65536; }

inline void check_widths(int64_t key, int64_t value) {
  STD_TORCH_CHECK(key >= 8 && key <= kMaxKeyWidth && key % 8 == 0, "key width ", key,
                  ": the kernel takes 8 to ", kMaxKeyWidth, " in multiples of 8");
  STD_TORCH_CHECK(value >= 8 && value % 8 == 0, "value width ", value,
                  ": the kernel takes multiples of 8");
}

inline void check_fused_width(int64_t width) {
  STD_TORCH_CHECK(width >= 8 && width <= kMaxFusedWidth && width % 8 == 0, "head width ", width,
                  ": the kernel takes 8 to ", kMaxFusedWidth, " in multiples of 8");
}

// The rows of a pool may be any distance apart, but must not overlap.
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
  check_tensor(state, "state", 4, ScalarType::Float, device);
  check_size(state, "state", 1, heads);
  check_size(state, "state", 2, value);
  check_size(state, "state", 3, key);
  check_pool(state, "state");
}

// z [S, H, K] that matches a checked state.
inline void check_denominator(const Tensor& z, const Tensor& state,
                              const Device& device = DeviceType::CPU) {
  check_tensor(z, "z", 3, ScalarType::Float, device);
  check_size(z, "z", 0, state.size(0));
  check_size(z, "z", 1, state.size(1));
  check_size(z, "z", 2, state.size(3));
  check_pool(z, "z");
}

// The first `dim` sizes of x float32 are those of q; if it has keys, they are contiguous.
inline void check_rows_of(const Tensor& q, const Tensor& x, const char* name, int64_t dim,
                          const Device& device) {
  check_tensor(x, name, dim, ScalarType::Float, device);
  for (int64_t i = 0; i < dim; ++i) check_size(x, name, i, q.size(i));
  STD_TORCH_CHECK(dim < 3 || x.size(2) <= 1 || x.stride(2) == 1, "the last dimension of ", name,
                  " must be contiguous");
}

// w [N, H] or [N, H, K], a and b [N, H, K], each or none, for q [N, H, K].
inline void check_terms(const Tensor& q, const std::optional<Tensor>& w,
                        const std::optional<Tensor>& a, const std::optional<Tensor>& b, bool has_z,
                        const Device& device = DeviceType::CPU) {
  STD_TORCH_CHECK(a.has_value() == b.has_value(), "a and b must be given together");
  STD_TORCH_CHECK(!a || !has_z, "a and b are not supported with z, a denominator");
  if (w) {
    STD_TORCH_CHECK(w->dim() == 2 || w->dim() == 3, "w must have 2 or 3 dimensions, not ",
                    w->dim());
    check_rows_of(q, *w, "w", w->dim(), device);
  }
  if (a) check_rows_of(q, *a, "a", 3, device);
  if (b) check_rows_of(q, *b, "b", 3, device);
}

inline void check_state_indices(const Tensor& state_indices, int64_t pool_size) {
  check_contiguous(state_indices, "state_indices", 1, ScalarType::Int);
  const int32_t* slot = state_indices.const_data_ptr<int32_t>();
  std::vector<bool> is_taken(pool_size);
  for (int64_t i = 0; i < state_indices.size(0); ++i) {
    if (slot[i] == kPaddingSlot) continue;
    STD_TORCH_CHECK(slot[i] >= 0 && slot[i] < pool_size, "slot ", slot[i],
                    " is out of range for a pool of ", pool_size);
    STD_TORCH_CHECK(!is_taken[slot[i]], "slot ", slot[i], " is named twice");
    is_taken[slot[i]] = true;
  }
}

// The segments in the order of their slots, or nothing if that is the order they have. In it each
// thread walks through its own part of the pool from one end to the other.
inline std::vector<int32_t> slot_order(const Tensor& state_indices) {
  check_contiguous(state_indices, "state_indices", 1, ScalarType::Int);
  const int32_t* slot = state_indices.const_data_ptr<int32_t>();
  const int64_t segments = state_indices.size(0);
  if (std::is_sorted(slot, slot + segments)) return {};
  std::vector<int32_t> order(segments);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t i, int32_t j) { return slot[i] < slot[j]; });
  return order;
}

inline void check_cu_seqlens(const std::optional<Tensor>& cu_seqlens, int64_t segments,
                             int64_t tokens) {
  if (!cu_seqlens) {
    STD_TORCH_CHECK(segments == tokens,
                    "without cu_seqlens there must be one state index per token: ", segments,
                    " state_indices, ", tokens, " tokens");
    return;
  }
  check_contiguous(*cu_seqlens, "cu_seqlens", 1, ScalarType::Int);
  check_size(*cu_seqlens, "cu_seqlens", 0, segments + 1);
  const int32_t* ends = cu_seqlens->const_data_ptr<int32_t>();
  STD_TORCH_CHECK(ends[0] == 0 && ends[segments] == tokens, "cu_seqlens must rise from 0 to ",
                  tokens);
  for (int64_t i = 0; i < segments; ++i)
    STD_TORCH_CHECK(ends[i] <= ends[i + 1], "cu_seqlens must rise from 0 to ", tokens);
}

// A task has all value rows of a head, or fewer where threads would be idle.
inline void split_rows(RecurrentParams& p, int64_t rows_per_split) {
  p.rows_per_split = rows_per_split;
  p.row_splits = ceil_div(p.value_width, rows_per_split);
}

inline int64_t useful_rows_per_split(const RecurrentParams& p, int64_t tokens) {
  const int64_t heads = p.segments * p.heads;
  const int64_t elements = std::max(tokens, p.segments) * p.heads * p.value_width * p.key_width;
  const int64_t useful = std::min(2 * int64_t(torch::stable::get_num_threads()),
                                  ceil_div(elements, elements_per_thread()));
  const int64_t row_splits = std::max<int64_t>(1, ceil_div(useful, std::max<int64_t>(1, heads)));
  return std::min(ceil_div(ceil_div(p.value_width, row_splits), 8) * 8, p.value_width);
}

// Checks the batch; the caller fills in q, k, v, z and out. `order`: slot_order(state_indices).
inline RecurrentParams pool_params(const Tensor& state, const Tensor& state_indices,
                                   const std::optional<Tensor>& cu_seqlens, int64_t tokens,
                                   const std::vector<int32_t>& order) {
  check_state_indices(state_indices, state.size(0));
  check_cu_seqlens(cu_seqlens, state_indices.size(0), tokens);
  RecurrentParams p{};
  p.state = state.mutable_data_ptr<float>();
  p.state_stride = state.stride(0);
  p.state_indices = state_indices.const_data_ptr<int32_t>();
  p.cu_seqlens = cu_seqlens ? cu_seqlens->const_data_ptr<int32_t>() : nullptr;
  p.segments = state_indices.size(0);
  p.heads = state.size(1);
  p.value_width = state.size(2);
  p.key_width = state.size(3);
  p.order = order.empty() ? nullptr : order.data();
  split_rows(p, useful_rows_per_split(p, tokens));
  p.prefetches = prefetches_ahead();
  return p;
}

// Calls task(i) for every segment, head and one of `row_splits` groups of value rows.
template <class Task>
void for_each_head(const RecurrentParams& p, int64_t tokens, int64_t row_splits, const Task& task) {
  const int64_t count = p.segments * p.heads * row_splits;
  const int64_t rows = row_splits == 1 ? p.value_width : p.rows_per_split;
  const int64_t work = std::max<int64_t>(1, ceil_div(tokens, p.segments) * p.key_width * rows);
  const bool is_decode = tokens <= p.segments;  // tasks of equal length
  const int64_t chunk = is_decode ? chunk_size(count, kStepChunksPerThread) : 1;
  for_each_task(count, elements_per_thread() / work, chunk, task);
}

}  // namespace cottention
