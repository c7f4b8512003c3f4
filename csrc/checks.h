// Checks that every op makes on its tensors before it touches their memory. Each error names the
// argument and what was expected.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "kernels.h"

namespace cottention {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;

// `device`: the CPU, or the CUDA device of the first tensor of an op.
inline void check_device(const Tensor& x, const char* name, const Device& device) {
  if (device.is_cuda()) {
    STD_TORCH_CHECK(x.device() == device, name, " must be on the CUDA device of the others");
  } else {
    STD_TORCH_CHECK(x.is_cpu(), name, " must be on the CPU");
  }
}

inline void check_tensor(const Tensor& x, const char* name, int64_t dim, ScalarType type,
                         const Device& device = DeviceType::CPU) {
  check_device(x, name, device);
  STD_TORCH_CHECK(x.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(x.dim() == dim, name, " must have ", dim, " dimensions, not ", x.dim());
}

// Types of q, k and v. The state is float32 for all of them.
inline void check_input_type(const Tensor& x, const char* name) {
  const ScalarType type = x.scalar_type();
  const bool is_known =
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
  STD_TORCH_CHECK(is_known, name, " must be float32, bfloat16 or float16");
}

// The last dimension must be contiguous; the other strides are free.
inline void check_rows(const Tensor& x, const char* name, int64_t dim,
                       ScalarType type = ScalarType::Float,
                       const Device& device = DeviceType::CPU) {
  check_tensor(x, name, dim, type, device);
  const bool contiguous = x.size(dim - 1) <= 1 || x.stride(dim - 1) == 1;
  STD_TORCH_CHECK(contiguous, "the last dimension of ", name, " must be contiguous");
}

inline void check_contiguous(const Tensor& x, const char* name, int64_t dim, ScalarType type,
                             const Device& device = DeviceType::CPU) {
  check_tensor(x, name, dim, type, device);
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
}

inline void check_size(const Tensor& x, const char* name, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(x.size(dim) == size, name, ".size(", dim, ") must be ", size, ", not ",
                  x.size(dim));
}

inline HeadView head_view(const Tensor& x) {
  return {x.const_data_ptr<float>(), x.stride(0), x.stride(1)};
}

}  // namespace cottention
