// The kernel of features_gelu.cuh on CUDA: warp reduction and launch.
#include "features_gelu.cuh"
#include "launch.cuh"
#include "types.cuh"

namespace cottention::cuda {
namespace {

template <class T, int kPairs>
__device__ void map_head(const FeaturesGeluParams& p, int64_t warp) {
  if (warp >= p.tokens * p.heads) return;
  Lane<T, kPairs> lane(p, warp, threadIdx.x % kWarp);
  lane.read(p);
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    for (float& sum : lane.sums) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  lane.write(p);
}

template <class T, int kPairs>
__global__ void __launch_bounds__(kThreads)
    features_gelu(const __grid_constant__ FeaturesGeluParams p) {
  let_next_kernel_begin();
  const int64_t heads = num_head_blocks(p);
  if (blockIdx.x < heads)
    map_head<T, kPairs>(p, int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp);
  else
    gelu_block<T>(p, blockIdx.x - heads, threadIdx.x);
}

template <class T>
void launch_as(const FeaturesGeluParams& p, int64_t blocks, void* stream) {
  with_pairs(p.width, [&](auto pairs) {
    launch(features_gelu<T, decltype(pairs)::value>, blocks, false, stream, p);
  });
}

}  // namespace

const char* launch_features_gelu(const FeaturesGeluParams& p, Type type, void* stream) {
  const int64_t blocks = num_head_blocks(p) + p.tokens * gelu_blocks_of_token(p);
  if (blocks > INT32_MAX) return "too many tokens at once";
  with_type(type, [&](auto of) { launch_as<typename decltype(of)::Type>(p, blocks, stream); });
  return launch_error();
}

}  // namespace cottention::cuda
