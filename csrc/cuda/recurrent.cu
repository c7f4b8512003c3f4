// recurrent_step on CUDA, with q, k, v and out of one type, and the fold of delayed updates. Never
// waits for the device.
#include "device_thread.cuh"
#include "types.cuh"

namespace cottention::cuda {
namespace {

template <class T, class TileShape, Form kForm, bool kIsGeneral>
__global__ void __launch_bounds__(kThreads, min_blocks<TileShape>(kForm, kIsGeneral))
    step(const __grid_constant__ StepParams p) {
  DeviceThread<Thread<T, T, TileShape>, TileShape> thread(threadIdx.x);
  run_block<TileShape, kForm, kIsGeneral>(p, blockIdx.x, thread);
}

template <class TileShape>
__global__ void __launch_bounds__(kThreads, 6) fold(const __grid_constant__ StepParams p) {
  DeviceThread<Thread<float, float, TileShape>, TileShape> thread(threadIdx.x);
  run_fold_block<TileShape>(p, blockIdx.x, thread);
}

template <class T, class TileShape, bool kIsGeneral>
void launch_form(const StepParams& p, void* stream) {
  const auto kernel = p.cu_seqlens ? step<T, TileShape, Form::kSegments, kIsGeneral>
                                   : step<T, TileShape, Form::kDecode, kIsGeneral>;
  launch(kernel, num_blocks<TileShape>(p), false, stream, p);
}

template <class T>
void launch_as(const StepParams& p, void* stream) {
  with_tile_shape(p.key_width, [&](auto shape) {
    using TileShape = decltype(shape);
    if (p.is_general())
      launch_form<T, TileShape, true>(p, stream);
    else
      launch_form<T, TileShape, false>(p, stream);
  });
}

}  // namespace

const char* launch_step(const StepParams& p, Type type, void* stream) {
  if (num_blocks_of(p) > INT32_MAX) return "too many segments at once";
  with_type(type, [&](auto of) { launch_as<typename decltype(of)::Type>(p, stream); });
  return launch_error();
}

const char* launch_fold(const StepParams& p, void* stream) {
  if (num_blocks_of(p) > INT32_MAX) return "too many slots at once";
  with_tile_shape(p.key_width, [&](auto shape) {
    using TileShape = decltype(shape);
    launch(fold<TileShape>, num_blocks<TileShape>(p), false, stream, p);
  });
  return launch_error();
}

}  // namespace cottention::cuda
