// recurrent_step on CUDA: what only a GPU can do, and the launch.
//
// Owns no arithmetic (recurrent.cuh) and no checks (ops.cpp). Never waits for the device.
#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "recurrent.cuh"

namespace cottention::cuda {
namespace {

constexpr int64_t kMaxTilesOfHead = 64;  // of 256 value rows, 4 at a time with the widest keys

// A thread among its block's: lanes sum by shuffles, and z waits for everybody.
template <class In, class Out, class Shape>
struct Member : Thread<In, Out, Shape> {
  using Thread<In, Out, Shape>::Thread;

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

template <class In, class Out, class Shape, bool kIsDecode>
__global__ void __launch_bounds__(kThreads, Shape::kPieces == 1 ? 8 : 6)
    step(const __grid_constant__ StepParams p) {
  Member<In, Out, Shape> member(threadIdx.x);
  run_block<Shape, kIsDecode>(p, blockIdx.x, member);
}

template <class In, class Out>
void launch(const StepParams& p, cudaStream_t stream) {
  with_shape(p.key_width, [&](auto shape) {
    using Shape = decltype(shape);
    static_assert(kMaxTilesOfHead * Shape::kTileRows >= kMaxValueWidth);
    const auto kernel = p.offsets ? step<In, Out, Shape, false> : step<In, Out, Shape, true>;
    kernel<<<static_cast<unsigned>(num_blocks<Shape>(p)), kThreads, 0, stream>>>(p);
  });
}

}  // namespace

const char* launch_step(const StepParams& p, Type in, Type out, void* stream) {
  if (p.segments * p.heads > INT32_MAX / kMaxTilesOfHead) return "too many segments at once";
  const auto on = static_cast<cudaStream_t>(stream);
  const bool is_wide = in == Type::kFloat;
  if (out == Type::kFloat) launch<float, float>(p, on);
  if (out == Type::kBFloat16 && is_wide) launch<float, c10::BFloat16>(p, on);
  if (out == Type::kBFloat16 && !is_wide) launch<c10::BFloat16, c10::BFloat16>(p, on);
  if (out == Type::kHalf && is_wide) launch<float, c10::Half>(p, on);
  if (out == Type::kHalf && !is_wide) launch<c10::Half, c10::Half>(p, on);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cottention::cuda
