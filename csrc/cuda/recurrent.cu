// recurrent_step on CUDA: warp reduction, barrier and launch; the arithmetic is in recurrent.cuh.
// Never waits for the device.
#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "recurrent.cuh"

namespace cottention::cuda {
namespace {

// A thread on the GPU: sums are reduced by shuffles, and z is stored behind a barrier.
template <class In, class Out, class TileShape>
struct DeviceThread : Thread<In, Out, TileShape> {
  using Thread<In, Out, TileShape>::Thread;

  template <int kCount>
  __device__ static void reduce(float (&sums)[kCount]) {
#pragma unroll
    for (int distance = TileShape::kLanes / 2; distance > 0; distance /= 2)
#pragma unroll
      for (float& sum : sums) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  __device__ void reduce() { reduce(this->sums); }
  __device__ void reduce_reads() { reduce(this->reads); }

  __device__ void sync_and_store_z(const StepParams& p, const BlockTask& task) {
    __syncthreads();
    this->store_z(p, task);
  }
};

template <class In, class Out, class TileShape, bool kIsDecode, bool kIsGeneral>
__global__ void __launch_bounds__(kThreads, TileShape::kPieces == 1 && !kIsGeneral ? 8 : 6)
    step(const __grid_constant__ StepParams p) {
  DeviceThread<In, Out, TileShape> thread(threadIdx.x);
  run_block<TileShape, kIsDecode, kIsGeneral>(p, blockIdx.x, thread);
}

template <class In, class Out, class TileShape, bool kIsGeneral>
void launch_form(const StepParams& p, cudaStream_t stream) {
  const auto kernel = p.cu_seqlens ? step<In, Out, TileShape, false, kIsGeneral>
                                   : step<In, Out, TileShape, true, kIsGeneral>;
  kernel<<<static_cast<unsigned>(num_blocks<TileShape>(p)), kThreads, 0, stream>>>(p);
}

template <class In, class Out>
void launch(const StepParams& p, cudaStream_t stream) {
  with_tile_shape(p.key_width, [&](auto shape) {
    using TileShape = decltype(shape);
    if (p.is_general())
      launch_form<In, Out, TileShape, true>(p, stream);
    else
      launch_form<In, Out, TileShape, false>(p, stream);
  });
}

int64_t num_blocks_of(const StepParams& p) {
  int64_t blocks = 0;
  with_tile_shape(p.key_width, [&](auto shape) { blocks = num_blocks<decltype(shape)>(p); });
  return blocks;
}

}  // namespace

const char* launch_step(const StepParams& p, Type in, Type out, void* stream) {
  if (num_blocks_of(p) > INT32_MAX) return "too many segments at once";
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
