// What stands before the step, on CUDA: the warps' sums and the launch. No arithmetic (map.cuh).
#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "features_gelu.cuh"

namespace cottention::cuda {
namespace {

template <class T, int kPairs>
__device__ void map_head(const MapParams& p, int64_t warp) {
  if (warp >= p.tokens * p.heads) return;
  Lane<T, kPairs> lane(p, warp, threadIdx.x % kWarp);
  lane.read(p);
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    for (float& sum : lane.sums) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  lane.write(p);
}

template <class T, int kPairs>
__global__ void __launch_bounds__(kThreads) map(const __grid_constant__ MapParams p) {
  const int64_t heads = num_map_blocks(p);
  if (blockIdx.x < heads)
    map_head<T, kPairs>(p, int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp);
  else
    map_gelu<T>(p, blockIdx.x - heads, threadIdx.x);
}

template <class T>
void launch(const MapParams& p, unsigned blocks, cudaStream_t stream) {
  with_pairs(p.width, [&](auto pairs) {
    map<T, decltype(pairs)::value><<<blocks, kThreads, 0, stream>>>(p);
  });
}

}  // namespace

const char* launch_map(const MapParams& p, Type type, void* stream) {
  const int64_t blocks = num_map_blocks(p) + p.tokens * gelu_blocks_of_token(p);
  if (blocks > INT32_MAX) return "too many tokens at once";
  const auto on = static_cast<cudaStream_t>(stream);
  if (type == Type::kFloat) launch<float>(p, blocks, on);
  if (type == Type::kBFloat16) launch<c10::BFloat16>(p, blocks, on);
  if (type == Type::kHalf) launch<c10::Half>(p, blocks, on);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cottention::cuda
