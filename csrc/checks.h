// What every op asks of its tensors before it touches their memory.
//
// Owns the wording of the errors: each names the op's argument and what it should have been.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "kernels.h"

namespace cottention {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;

// `device` is the CPU, or the CUDA device of an op's first tensor.
inline void check_device(const Tensor& x, const char* name, const Device& device) {
  if (device.is_cuda()) {
    STD_TORCH_CHECK(x.device() == device, name, " must be on the CUDA device of the others");
  } else {
    STD_TORCH_CHECK(x.is_cpu(), name, " must be on the CPU");
  }
}

inline void check_kind(const Tensor& x, const char* name, int64_t dim, ScalarType type,
                       const Device& device = DeviceType::CPU) {
  check_device(x, name, device);
  STD_TORCH_CHECK(x.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(x.dim() == dim, name, " must have ", dim, " dimensions, not ", x.dim());
}

// Queries, keys and values; what they move is float32 whatever their type.
inline void check_input_type(const Tensor& x, const char* name) {
  const ScalarType type = x.scalar_type();
  const bool is_known = type == ScalarType::Float || type == ScalarType::BFloat16 ||
                        type == ScalarType::Half;
  STD_TORCH_CHECK(is_known, name, " must be float32, bfloat16 or float16");
}

// A contiguous last dimension; the other strides are free.
inline void check_rows(const Tensor& x, const char* name, int64_t dim,
                       ScalarType type = ScalarType::Float,
                       const Device& device = DeviceType::CPU) {
  check_kind(x, name, dim, type, device);
  const bool contiguous = x.size(dim - 1) <= 1 || x.stride(dim - 1) == 1;
  STD_TORCH_CHECK(contiguous, "the last dimension of ", name, " must be contiguous");
}

inline void check_contiguous(const Tensor& x, const char* name, int64_t dim, ScalarType type,
                             const Device& device = DeviceType::CPU) {
  check_kind(x, name, dim, type, device);
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
