// The kernel of add_layer_norm.cuh on CUDA: sums over a block, and launch.
#include "add_layer_norm.cuh"
#include "launch.cuh"
#include "types.cuh"

namespace cottention::cuda {
namespace {

constexpr int kLanesOfWarp = 32, kWarpsOfBlock = kThreads / kLanesOfWarp;

template <class Y, class Out>
struct DeviceNormThread : NormThread<Y, Out> {
  using NormThread<Y, Out>::NormThread;

  __device__ float total() const {
    __shared__ float parts[kWarpsOfBlock];
    float sum = this->sum;
#pragma unroll
    for (int distance = kLanesOfWarp / 2; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    __syncthreads();  // the parts of the sum before have been read
    if (threadIdx.x % kLanesOfWarp == 0) parts[threadIdx.x / kLanesOfWarp] = sum;
    __syncthreads();
    sum = parts[0];
#pragma unroll
    for (int i = 1; i < kWarpsOfBlock; ++i) sum += parts[i];
    return sum;
  }
};

template <class Y, class Out>
__global__ void __launch_bounds__(kThreads)
    add_layer_norm(const __grid_constant__ AddLayerNormParams p) {
  await_kernel_before();
  DeviceNormThread<Y, Out> thread(threadIdx.x);
  run_norm_block(p, blockIdx.x, thread);
}

}  // namespace

const char* launch_add_layer_norm(const AddLayerNormParams& p, Type y, Type out, void* stream) {
  if (p.rows > INT32_MAX) return "too many rows at once";
  with_type(y, [&](auto of_y) {
    with_type(out, [&](auto of_out) {
      using Y = typename decltype(of_y)::Type;
      launch(add_layer_norm<Y, typename decltype(of_out)::Type>, p.rows, true, stream, p);
    });
  });
  return launch_error();
}

}  // namespace cottention::cuda
