// Launches: on a stream, and where the device can overlapping with the end of the kernel before.
#pragma once

#include <cuda_runtime.h>

#include "memory.cuh"

namespace cottention::cuda {

// Whether a kernel may begin while the one before it on the stream ends (compute capability 9.0).
inline bool can_overlap() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 9;
}

// In a kernel that overlaps: what the kernels before it have written can be read from here on.
__device__ __forceinline__ void await_kernel_before() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// The kernel after this one may begin, if it overlaps, once all blocks of this one have called it.
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Enqueues `blocks` of kThreads. A kernel that `overlaps` must call await_kernel_before in every
// block, and may only read before that what the kernel before did not write.
template <class... Params>
void launch(void (*kernel)(Params...), int64_t blocks, bool overlaps, void* stream,
            const Params&... params) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = kThreads;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = overlaps && can_overlap() ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, params...);
}

// The message of the last launch's error, or null.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cottention::cuda
