// recurrent_step on CUDA as torch sees it: the checks, the parameters, the current stream.
//
// Owns no arithmetic. Looks at no slot and no offset: they lie on the device, and whoever made them
// has checked them; the kernel skips what lies outside the pool or the batch. The arguments are
// those of the CPU's op; q, k and v may be float32, bfloat16 or float16, all of one type.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../pool.h"
#include "params.h"

// In libtorch_cuda. Weak, so that the library also loads (and registers) beside a torch without it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace cottention::cuda {
namespace {

constexpr int64_t kBytesAtOnce = 16;

Type type_of(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  if (type == ScalarType::Float) return Type::kFloat;
  if (type == ScalarType::BFloat16) return Type::kBFloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, "q must be float32, bfloat16 or float16");
  return Type::kHalf;
}

// On the device of the state, with so many dimensions of this type.
void check_here(const Tensor& x, const char* name, int64_t dim, ScalarType type,
                const Tensor& state) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == state.get_device_index(), name,
                  " must be on the CUDA device of the state");
  STD_TORCH_CHECK(x.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(x.dim() == dim, name, " must have ", dim, " dimensions, not ", x.dim());
}

void check_tokens(const Tensor& x, const char* name, const Tensor& q, const Tensor& state) {
  check_here(x, name, 3, q.scalar_type(), state);
  check_size(x, name, 0, q.size(0));
  check_size(x, name, 1, state.size(1));
  STD_TORCH_CHECK(x.size(2) <= 1 || x.stride(2) == 1, "the last dimension of ", name,
                  " must be contiguous");
}

void check_rows_aligned(const Tensor& pool, const char* name) {
  check_pool(pool, name);
  const auto address = reinterpret_cast<uintptr_t>(pool.const_data_ptr<float>());
  const bool is_aligned = address % kBytesAtOnce == 0 && pool.stride(0) * 4 % kBytesAtOnce == 0;
  STD_TORCH_CHECK(is_aligned, "the rows of ", name, " must begin at multiples of 16 bytes");
}

void check_pools(const Tensor& q, const Tensor& v, const Tensor& state,
                 const std::optional<Tensor>& z) {
  check_here(state, "state", 4, ScalarType::Float, state);
  check_size(state, "state", 2, v.size(2));
  check_size(state, "state", 3, q.size(2));
  check_rows_aligned(state, "state");
  if (!z) return;
  check_here(*z, "z", 3, ScalarType::Float, state);
  check_size(*z, "z", 0, state.size(0));
  check_size(*z, "z", 1, state.size(1));
  check_size(*z, "z", 2, state.size(3));
  check_rows_aligned(*z, "z");
}

void check_segments(const Tensor& slots, const std::optional<Tensor>& offsets, int64_t tokens,
                    const Tensor& state) {
  check_here(slots, "slots", 1, ScalarType::Int, state);
  STD_TORCH_CHECK(slots.is_contiguous(), "slots must be contiguous");
  const int64_t segments = slots.size(0);
  if (offsets) {
    check_here(*offsets, "offsets", 1, ScalarType::Int, state);
    STD_TORCH_CHECK(offsets->is_contiguous(), "offsets must be contiguous");
    check_size(*offsets, "offsets", 0, segments + 1);
    return;
  }
  STD_TORCH_CHECK(segments == tokens, "without offsets there must be one slot per token: ",
                  segments, " slots, ", tokens, " tokens");
}

View view_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

// Whether four neighbouring elements may be read at once wherever the fourth divides the place.
bool is_aligned(const Tensor& x, int64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(x.data_ptr());
  return address % (4 * bytes) == 0 && x.stride(0) % 4 == 0 && x.stride(1) % 4 == 0;
}

void* current_stream(const Tensor& state) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(state.get_device_index(), &stream));
  return stream;
}

StepParams params_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state,
                     const std::optional<Tensor>& z, const Tensor& slots,
                     const std::optional<Tensor>& offsets) {
  StepParams p{view_of(q), view_of(k), view_of(v)};
  p.state = state.mutable_data_ptr<float>();
  p.z = z ? z->mutable_data_ptr<float>() : nullptr;
  p.state_stride = state.stride(0);
  p.z_stride = z ? z->stride(0) : 0;
  p.slots = slots.const_data_ptr<int32_t>();
  p.offsets = offsets ? offsets->const_data_ptr<int32_t>() : nullptr;
  p.tokens = q.size(0);
  p.segments = slots.size(0);
  p.heads = static_cast<int>(state.size(1));
  p.value_width = static_cast<int>(state.size(2));
  p.key_width = static_cast<int>(state.size(3));
  p.num_slots = static_cast<int>(state.size(0));
  const int64_t bytes = q.scalar_type() == ScalarType::Float ? 4 : 2;
  p.is_aligned = is_aligned(q, bytes) && is_aligned(k, bytes);
  return p;
}

Tensor recurrent_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state,
                      const std::optional<Tensor>& z, const Tensor& slots,
                      const std::optional<Tensor>& offsets) {
  const Type type = type_of(q);
  STD_TORCH_CHECK(state.dim() == 4, "state must have 4 dimensions, not ", state.dim());
  check_tokens(q, "q", q, state);
  check_tokens(k, "k", q, state);
  check_tokens(v, "v", q, state);
  check_size(k, "k", 2, q.size(2));
  check_widths(q.size(2), v.size(2));
  check_pools(q, v, state, z);
  check_segments(slots, offsets, q.size(0), state);
  Tensor out = torch::stable::new_empty(v, {v.size(0), v.size(1), v.size(2)});
  StepParams p = params_of(q, k, v, state, z, slots, offsets);
  p.out = out.data_ptr();
  p.out_stride = v.size(1) * v.size(2);
  if (p.tokens == 0 || p.heads == 0) return out;
  const torch::stable::accelerator::DeviceGuard guard(state.get_device_index());
  const char* error = launch_step(p, type, current_stream(state));
  STD_TORCH_CHECK(!error, "recurrent_step on CUDA: ", error ? error : "");
  return out;
}

}  // namespace
}  // namespace cottention::cuda

STABLE_TORCH_LIBRARY_IMPL(cottention, CUDA, m) {
  m.impl("recurrent_step", TORCH_BOX(&cottention::cuda::recurrent_step));
}
