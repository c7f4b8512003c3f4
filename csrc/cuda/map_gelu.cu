// The kernels of map_gelu.cuh on CUDA: barriers and launch.
#include "launch.cuh"
#include "map_gelu.cuh"
#include "types.cuh"

namespace cottention::cuda {
namespace {

template <class T>
struct DeviceMapTeam {
  MapThread<T> thread;

  template <class Visit>
  __device__ void each(const Visit& visit) {
    visit(thread);
    __syncthreads();
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) map_gelu(const __grid_constant__ MapParams p) {
  const int64_t heads = p.tokens * p.heads;
  if (blockIdx.x < heads) {
    __shared__ MapShared shared;
    DeviceMapTeam<T> team{MapThread<T>(p, blockIdx.x, threadIdx.x)};
    run_map_block(p, shared, team);
  } else {
    gelu_block<T>(p, blockIdx.x - heads, threadIdx.x);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    divide_outputs(const __grid_constant__ DivideParams p) {
  divide<T>(p, int64_t(blockIdx.x) * kThreads + threadIdx.x);
}

}  // namespace

const char* launch_map_gelu(const MapParams& p, Type type, void* stream) {
  const int64_t blocks = p.tokens * p.heads + p.tokens * gelu_blocks_of_token(p);
  if (blocks > INT32_MAX) return "too many tokens at once";
  with_type(type, [&](auto of) {
    launch(map_gelu<typename decltype(of)::Type>, blocks, false, stream, p);
  });
  return launch_error();
}

const char* launch_divide(const DivideParams& p, Type type, void* stream) {
  const int64_t blocks = (num_quotients(p) + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return "too many tokens at once";
  with_type(type, [&](auto of) {
    launch(divide_outputs<typename decltype(of)::Type>, blocks, false, stream, p);
  });
  return launch_error();
}

}  // namespace cottention::cuda
