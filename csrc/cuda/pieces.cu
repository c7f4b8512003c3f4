// Both passes over the pieces of segments of many tokens, without w, a and b. Never waits for the
// device.
#include "device_thread.cuh"
#include "types.cuh"

namespace cottention::cuda {
namespace {

template <class In, class Out, class TileShape, Form kForm>
__global__ void __launch_bounds__(kThreads, min_blocks<TileShape>(kForm, false))
    step_pieces(const __grid_constant__ StepParams p) {
  DeviceThread<Thread<In, Out, TileShape>, TileShape> thread(threadIdx.x);
  run_block<TileShape, kForm, false>(p, blockIdx.x, thread);
}

template <class In, class Out>
void launch_pass(const StepParams& p, Pass pass, bool is_after_map, void* stream) {
  with_tile_shape(p.key_width, [&](auto shape) {
    using TileShape = decltype(shape);
    const auto kernel = pass == Pass::kFirst
                            ? step_pieces<In, Out, TileShape, Form::kFirstPieces>
                            : step_pieces<In, Out, TileShape, Form::kLaterPieces>;
    launch(kernel, num_blocks<TileShape>(p), is_after_map, stream, p);
  });
}

}  // namespace

const char* launch_pieces(const StepParams& p, Type in, Type out, Pass pass, bool is_after_map,
                          void* stream) {
  if (num_blocks_of(p) > INT32_MAX) return "too many segments at once";
  with_types(in, out, [&](auto of_in, auto of_out) {
    using In = typename decltype(of_in)::Type;
    launch_pass<In, typename decltype(of_out)::Type>(p, pass, is_after_map, stream);
  });
  return launch_error();
}

}  // namespace cottention::cuda
