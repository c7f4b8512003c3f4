// The kernel of attention_gelu.cuh on CUDA: blocks of the step first, then those of the gelu.
#include "attention_gelu.cuh"
#include "device_thread.cuh"
#include "types.cuh"

namespace cottention::cuda {
namespace {

template <class T, class TileShape, bool kIsDelayed>
__global__ void __launch_bounds__(kThreads, 6)
    attention_gelu(const __grid_constant__ StepParams p,
                   const __grid_constant__ FeaturesGeluParams m) {
  const int64_t blocks = num_blocks<TileShape>(p);
  if (blockIdx.x < blocks) {
    DeviceThread<MappingThread<T, TileShape>, TileShape> thread(threadIdx.x);
    run_attention_block<TileShape, kIsDelayed>(p, m, blockIdx.x, thread);
  } else {
    await_kernel_before();
    gelu_block<T>(m, blockIdx.x - blocks, threadIdx.x);
  }
}

template <class T>
const char* launch_as(const StepParams& p, const FeaturesGeluParams& m, void* stream) {
  int64_t blocks = m.tokens * gelu_blocks_of_token(m);
  with_head_shape(m.width, [&](auto shape) {
    using TileShape = decltype(shape);
    blocks += num_blocks<TileShape>(p);
    if (blocks > INT32_MAX) return;
    const auto kernel = p.delayed.keys ? attention_gelu<T, TileShape, true>
                                       : attention_gelu<T, TileShape, false>;
    launch(kernel, blocks, true, stream, p, m);
  });
  return blocks <= INT32_MAX ? launch_error() : "too many tokens at once";
}

}  // namespace

const char* launch_attention_gelu(const StepParams& p, const FeaturesGeluParams& m, Type type,
                                  void* stream) {
  return with_type(type,
                   [&](auto of) { return launch_as<typename decltype(of)::Type>(p, m, stream); });
}

}  // namespace cottention::cuda
