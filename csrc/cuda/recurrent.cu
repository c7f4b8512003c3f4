// recurrent_step on CUDA: what only a GPU can do, and the launch.
//
// Owns no arithmetic (recurrent.cuh) and no checks (ops.cpp). Never waits for the device.
#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "recurrent.cuh"

namespace cottention::cuda {
namespace {

// A thread among its block's: lanes sum by shuffles, and z waits for everybody.
template <class T, class Shape>
struct Member : Thread<T, Shape> {
  using Thread<T, Shape>::Thread;

  __device__ void fold() {
#pragma unroll
    for (int distance = Shape::kLanes / 2; distance > 0; distance /= 2)
#pragma unroll
      for (float& sum : this->sums) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }

  __device__ void settle(const StepParams& p, const Place& at) {
    __syncthreads();
    this->store_z(p, at);
  }
};

template <class T, class Shape, bool kIsDecode>
__global__ void __launch_bounds__(kThreads, Shape::kPieces == 1 ? 8 : 6)
    step(const __grid_constant__ StepParams p) {
  Member<T, Shape> member(threadIdx.x);
  run_block<Shape, kIsDecode>(p, blockIdx.x, member);
}

template <class T>
void launch(const StepParams& p, cudaStream_t stream) {
  with_shape(p.key_width, [&](auto shape) {
    using Shape = decltype(shape);
    const auto kernel = p.offsets ? step<T, Shape, false> : step<T, Shape, true>;
    kernel<<<static_cast<unsigned>(num_blocks<Shape>(p)), kThreads, 0, stream>>>(p);
  });
}

}  // namespace

const char* launch_step(const StepParams& p, Type type, void* stream) {
  constexpr int64_t kMaxTilesOfHead = 32;  // of 256 rows, 8 at a time
  if (p.segments * p.heads > INT32_MAX / kMaxTilesOfHead) return "too many segments at once";
  const auto on = static_cast<cudaStream_t>(stream);
  if (type == Type::kFloat) launch<float>(p, on);
  if (type == Type::kBFloat16) launch<c10::BFloat16>(p, on);
  if (type == Type::kHalf) launch<c10::Half>(p, on);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cottention::cuda
