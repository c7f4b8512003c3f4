// Checks of the CUDA ops beyond those of all ops, their parameters, and what they take from torch.
//
// State indices, cu_seqlens and positions are not checked: they are on the device, and reading them
// would wait for it. The caller has checked them on the host.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../pool.h"
#include "device.h"
#include "params.h"

namespace cottention::cuda {

inline Type type_of(const Tensor& x, const char* name) {
  check_input_type(x, name);
  if (x.scalar_type() == ScalarType::Float) return Type::kFloat;
  return x.scalar_type() == ScalarType::BFloat16 ? Type::kBFloat16 : Type::kHalf;
}

inline int64_t bytes_of(Type type) { return type == Type::kFloat ? 4 : 2; }

inline void check_rows_aligned(const Tensor& pool, const char* name) {
  const auto address = reinterpret_cast<uintptr_t>(pool.data_ptr());
  STD_TORCH_CHECK(address % 16 == 0 && pool.stride(0) % 4 == 0, "the rows of ", name,
                  " must begin at multiples of 16 bytes");
}

// state [S, H, V, K] and z [S, H, K] or none.
inline void check_pools(const Tensor& state, const std::optional<Tensor>& z, int64_t heads,
                        int64_t value, int64_t key, const Device& device) {
  check_state(state, heads, value, key, device);
  check_rows_aligned(state, "state");
  if (!z) return;
  check_denominator(*z, state, device);
  check_rows_aligned(*z, "z");
}

inline void check_segments(const Tensor& state_indices, const std::optional<Tensor>& cu_seqlens,
                           int64_t tokens, const Device& device) {
  check_contiguous(state_indices, "state_indices", 1, ScalarType::Int, device);
  STD_TORCH_CHECK(state_indices.size(0) > 0 || tokens == 0, "no state_indices for ", tokens,
                  " tokens");
  if (cu_seqlens) {
    check_contiguous(*cu_seqlens, "cu_seqlens", 1, ScalarType::Int, device);
    check_size(*cu_seqlens, "cu_seqlens", 0, state_indices.size(0) + 1);
    return;
  }
  STD_TORCH_CHECK(state_indices.size(0) == tokens,
                  "without cu_seqlens there must be one state index per token: ",
                  state_indices.size(0), " state_indices, ", tokens, " tokens");
}

inline View view_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

// Whether four elements can be loaded or stored at once at every index that is a multiple of four.
inline bool is_aligned(const void* data, int64_t bytes, int64_t stride, int64_t other = 0) {
  return reinterpret_cast<uintptr_t>(data) % (4 * bytes) == 0 && stride % 4 == 0 && other % 4 == 0;
}

// pieces int32 [P, 5], as `Piece`; the first `num_cut` are those of segments that are cut.
inline void check_pieces(const Tensor& pieces, int64_t num_cut, int64_t tokens,
                         const Device& device) {
  check_contiguous(pieces, "pieces", 2, ScalarType::Int, device);
  check_size(pieces, "pieces", 1, sizeof(Piece) / sizeof(int32_t));
  STD_TORCH_CHECK(pieces.size(0) > 0 || tokens == 0, "no pieces for ", tokens, " tokens");
  STD_TORCH_CHECK(num_cut >= 0 && num_cut <= pieces.size(0), "num_cut must be 0 to ",
                  pieces.size(0), ", not ", num_cut);
}

// The pool alone; the caller fills in the batch.
inline StepParams pool_params(const Tensor& state, const std::optional<Tensor>& z,
                              int64_t tokens) {
  StepParams p{};
  p.state = static_cast<float*>(state.data_ptr());
  p.state_stride = state.stride(0);
  p.z = z ? static_cast<float*>(z->data_ptr()) : nullptr;
  p.z_stride = z ? z->stride(0) : 0;
  p.tokens = tokens;
  p.heads = static_cast<int>(state.size(1));
  p.value_width = static_cast<int>(state.size(2));
  p.key_width = static_cast<int>(state.size(3));
  p.num_slots = static_cast<int>(state.size(0));
  return p;
}

// The pool and the batch on it; the caller fills in q, k, v and out.
inline StepParams step_params(const Tensor& state, const std::optional<Tensor>& z,
                              const Tensor& state_indices, const std::optional<Tensor>& cu_seqlens,
                              int64_t tokens) {
  StepParams p = pool_params(state, z, tokens);
  p.state_indices = static_cast<const int32_t*>(state_indices.data_ptr());
  p.cu_seqlens = cu_seqlens ? static_cast<const int32_t*>(cu_seqlens->data_ptr()) : nullptr;
  p.segments = state_indices.size(0);
  return p;
}

// keys [S, C, H, K] and values [S, C, H, V] float32, counts int32 [S or more], for a checked state.
inline void check_delayed(const Tensor& keys, const Tensor& values, const Tensor& counts,
                          const Tensor& state, const Device& device) {
  check_contiguous(counts, "counts", 1, ScalarType::Int, device);
  STD_TORCH_CHECK(counts.size(0) >= state.size(0), "counts must have one for each of ",
                  state.size(0), " slots, not ", counts.size(0));
  const Tensor* pairs[] = {&keys, &values};
  const char* names[] = {"keys", "values"};
  const int64_t widths[] = {state.size(3), state.size(2)};
  for (int i = 0; i < 2; ++i) {
    const Tensor& x = *pairs[i];
    check_tensor(x, names[i], 4, ScalarType::Float, device);
    check_size(x, names[i], 0, state.size(0));
    check_size(x, names[i], 1, keys.size(1));
    check_size(x, names[i], 2, state.size(1));
    check_size(x, names[i], 3, widths[i]);
    STD_TORCH_CHECK(x.stride(3) == 1 && x.stride(2) == widths[i], names[i],
                    " must be contiguous behind its second dimension");
    STD_TORCH_CHECK(is_aligned(x.data_ptr(), 4, x.stride(0), x.stride(1)), names[i],
                    " must begin at multiples of 16 bytes");
  }
  STD_TORCH_CHECK(keys.size(1) >= 1, "keys must have room for one update");
}

// Already checked.
inline DelayedUpdates delayed_updates(const Tensor& keys, const Tensor& values,
                                      const Tensor& counts) {
  DelayedUpdates d{};
  d.keys = static_cast<float*>(keys.data_ptr());
  d.values = static_cast<float*>(values.data_ptr());
  d.key_slot_stride = keys.stride(0);
  d.key_stride = keys.stride(1);
  d.value_slot_stride = values.stride(0);
  d.value_stride = values.stride(1);
  d.counts = static_cast<const int32_t*>(counts.data_ptr());
  d.capacity = static_cast<int>(keys.size(1));
  return d;
}

// q, k and v, already checked, and out [N, H, V].
inline void set_inputs(StepParams& p, const Tensor& q, const Tensor& k, const Tensor& v,
                       const Tensor& out, int64_t bytes) {
  p.q = view_of(q);
  p.k = view_of(k);
  p.v = view_of(v);
  p.out = out.data_ptr();
  p.out_stride = v.size(1) * v.size(2);
  p.is_aligned = is_aligned(q.data_ptr(), bytes, q.stride(0), q.stride(1)) &&
                 is_aligned(k.data_ptr(), bytes, k.stride(0), k.stride(1));
}

// w, a and b, already checked.
inline void set_terms(StepParams& p, const std::optional<Tensor>& w, const std::optional<Tensor>& a,
                      const std::optional<Tensor>& b) {
  p.decay = !w ? Decay::kNone : w->dim() == 2 ? Decay::kPerHead : Decay::kPerKey;
  p.has_term = a.has_value();
  if (w) p.w = view_of(*w);
  if (a) p.a = view_of(*a);
  if (b) p.b = view_of(*b);
  p.is_terms_aligned = true;
  for (const View* x : {&p.w, &p.a, &p.b})
    if (!is_aligned(x->data, 4, x->token_stride, x->head_stride)) p.is_terms_aligned = false;
}

inline void check_launch(const char* error) {
  STD_TORCH_CHECK(!error, "CUDA: ", error ? error : "");
}

}  // namespace cottention::cuda
