// The device that the ops of this folder run on, and its current stream.
//
// Where COTTENTION_ON_HOST is defined, tests run the ops on the CPU, with kernels of their own.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#ifdef COTTENTION_ON_HOST

namespace cottention::cuda {

using torch::headeronly::DeviceType;
using torch::stable::Device;
using torch::stable::Tensor;

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline Device device_of(const Tensor&) { return DeviceType::CPU; }
inline void* current_stream(const Device&) { return nullptr; }

}  // namespace cottention::cuda

#else

#include <torch/csrc/stable/accelerator.h>

// In libtorch_cuda. Weak, so that the library also loads (and registers) with a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace cottention::cuda {

using torch::headeronly::DeviceType;
using torch::stable::Device;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// The CUDA device of an op; a first tensor on another kind of device fails the checks.
inline Device device_of(const Tensor& first) {
  return Device(DeviceType::CUDA, first.get_device_index());
}

inline void* current_stream(const Device& device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index(), &stream));
  return stream;
}

}  // namespace cottention::cuda

#endif
