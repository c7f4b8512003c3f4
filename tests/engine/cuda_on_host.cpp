// The kernels of csrc/cuda on a host, for its ops: the threads of a block in turn, through the same
// functions. They are registered as cottention_on_host, for tensors on the CPU.
//
// A shuffle becomes an exchange between array elements, a barrier the end of a loop. Registers
// start as NaN, so that a read before the first write shows. Launches are counted.
#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "../../csrc/cuda/add_layer_norm.cuh"
#include "../../csrc/cuda/attention_gelu.cuh"
#include "../../csrc/cuda/features_gelu.cuh"
#include "../../csrc/cuda/map_gelu.cuh"
#include "../../csrc/cuda/ops.h"
#include "../../csrc/cuda/recurrent.cuh"
#include "../../csrc/cuda/types.cuh"
#include "../../csrc/schemas.h"

namespace cottention::cuda {
namespace {

constexpr float kUnset = std::numeric_limits<float>::quiet_NaN();
int64_t launches = 0;

// A butterfly shuffle and sum of one number per lane: adds that of the lane at `distance`.
template <int kCount, class Get>
void exchange(int distance, const Get& get) {
  std::array<float, kCount> before;
  for (int i = 0; i < kCount; ++i) before[i] = get(i);
  for (int i = 0; i < kCount; ++i) get(i) += before[i ^ distance];
}

void unset(Quad& quad) { quad = {{kUnset, kUnset, kUnset, kUnset}}; }

template <class TileShape>
void unset(Inputs<TileShape>& inputs) {
  for (Quad& quad : inputs.key) unset(quad);
  for (Quad& quad : inputs.query) unset(quad);
  for (float& value : inputs.value) value = kUnset;
}

// The threads of a block of the step.
template <class DeviceThread, class TileShape>
struct Block {
  std::vector<DeviceThread> threads;

  Block() {
    for (int i = 0; i < kThreads; ++i) {
      DeviceThread thread(i);
      for (float& sum : thread.sums) sum = kUnset;
      for (float& sum : thread.reads) sum = kUnset;
      for (auto& row : thread.h)
        for (Quad& quad : row) unset(quad);
      for (Quad& quad : thread.z) unset(quad);
      unset(thread.now);
      unset(thread.next);
      threads.push_back(thread);
    }
  }
  template <class Visit>
  void each(const Visit& visit) {
    for (auto& thread : threads) visit(thread);
  }
  // Sums numbers of each thread over the lanes of its group.
  template <int kCount, class Get>
  void reduce_lanes(const Get& get) {
    for (int distance = TileShape::kLanes / 2; distance > 0; distance /= 2)
      for (int s = 0; s < kCount; ++s)
        exchange<kThreads>(distance, [&](int i) -> float& { return get(threads[i])[s]; });
  }

  void await_inputs() {}
  template <Form kForm>
  void load(const StepParams& p, const BlockTask& task, int tile) {
    each([&](auto& thread) { thread.template load<kForm>(p, task, tile); });
  }
  void fetch(const StepParams& p, const BlockTask& task, int64_t token) {
    each([&](auto& thread) { thread.fetch(p, task, token); });
  }
  void add_delayed(const StepParams& p, const BlockTask& task) {
    each([&](auto& thread) { thread.add_delayed(p, task); });
  }
  void append(const StepParams& p, const BlockTask& task) {
    each([&](auto& thread) { thread.append(p, task); });
  }
  void take() {
    each([](auto& thread) { thread.take(); });
  }
  void advance(const StepParams& p) {
    each([&](auto& thread) { thread.advance(p); });
  }
  void reduce() {
    reduce_lanes<DeviceThread::kSums>([](auto& thread) { return thread.sums; });
  }
  void read(const StepParams& p, const BlockTask& task, int64_t token) {
    each([&](auto& thread) { thread.read(p, task, token); });
  }
  void reduce_reads() {
    reduce_lanes<TileShape::kRows>([](auto& thread) { return thread.reads; });
  }
  void advance_general(const StepParams& p, const BlockTask& task, int64_t token) {
    each([&](auto& thread) { thread.advance_general(p, task, token); });
  }
  void read_inputs(const FeaturesGeluParams& m, const BlockTask& task) {
    each([&](auto& thread) { thread.read_inputs(m, task); });
  }
  void reduce_squares() {
    reduce_lanes<2>([](auto& thread) { return thread.squares; });
  }
  void map(const FeaturesGeluParams& m, const BlockTask& task) {
    each([&](auto& thread) { thread.map(m, task); });
  }
  void write(const StepParams& p, const BlockTask& task, int64_t token) {
    each([&](auto& thread) { thread.write(p, task, token); });
  }
  void store(const StepParams& p) {
    each([&](auto& thread) { thread.store(p); });
  }
  void sync_and_store_z(const StepParams& p) {
    each([&](auto& thread) { thread.store_z(p); });
  }
  void clear(const StepParams& p, const BlockTask& task) {
    each([&](auto& thread) { thread.clear(p, task); });
  }
};

// All blocks of a kernel of the step, one after the other.
template <class In, class Out, Form kForm, bool kIsGeneral>
void step(const StepParams& p) {
  with_tile_shape(p.key_width, [&](auto shape) {
    using TileShape = decltype(shape);
    for (int64_t i = 0; i < num_blocks<TileShape>(p); ++i) {
      Block<Thread<In, Out, TileShape>, TileShape> block;
      run_block<TileShape, kForm, kIsGeneral>(p, i, block);
    }
  });
}

template <class T, bool kIsGeneral>
void step_form(const StepParams& p) {
  if (p.cu_seqlens)
    step<T, T, Form::kSegments, kIsGeneral>(p);
  else
    step<T, T, Form::kDecode, kIsGeneral>(p);
}

template <class T, int kPairs>
void map_head(const FeaturesGeluParams& p, int64_t warp) {
  std::vector<Lane<T, kPairs>> lanes;
  for (int i = 0; i < kWarp; ++i) lanes.emplace_back(p, warp, i);
  for (auto& lane : lanes) lane.read(p);
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    for (int s = 0; s < 2; ++s)
      exchange<kWarp>(distance, [&](int i) -> float& { return lanes[i].sums[s]; });
  for (auto& lane : lanes) lane.write(p);
}

// The threads of a block that maps; what they share is NaN before it is written.
template <class T>
struct MapBlock {
  std::vector<MapThread<T>> threads;
  MapShared shared;

  MapBlock(const MapParams& p, int64_t block) {
    for (int i = 0; i < kThreads; ++i) threads.emplace_back(p, block, i);
    float* numbers = reinterpret_cast<float*>(&shared);
    std::fill(numbers, numbers + sizeof(shared) / sizeof(float), kUnset);
  }
  template <class Visit>
  void each(const Visit& visit) {
    for (auto& thread : threads) visit(thread);
  }
};

template <class T>
void gelu(const FeaturesGeluParams& p) {
  for (int64_t i = 0; i < p.tokens * gelu_blocks_of_token(p); ++i)
    for (int thread = 0; thread < kThreads; ++thread) gelu_block<T>(p, i, thread);
}

// The threads of a block of the norm.
template <class Y, class Out>
struct NormBlock {
  std::vector<NormThread<Y, Out>> threads;

  NormBlock() {
    for (int i = 0; i < kThreads; ++i) threads.emplace_back(i);
  }
  void add(const AddLayerNormParams& p, int64_t row) {
    for (auto& thread : threads) thread.add(p, row);
  }
  void add_squares(const AddLayerNormParams& p, int64_t row, float mean) {
    for (auto& thread : threads) thread.add_squares(p, row, mean);
  }
  void write(const AddLayerNormParams& p, int64_t row, float mean, float variance) {
    for (auto& thread : threads) thread.write(p, row, mean, variance);
  }
  float total() {
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      exchange<kThreads>(distance, [&](int i) -> float& { return threads[i].sum; });
    float sum = threads[0].sum;
    for (int i = 1; i < kWarps; ++i) sum += threads[i * kWarp].sum;
    return sum;
  }
};

}  // namespace

const char* launch_step(const StepParams& p, Type type, void*) {
  ++launches;
  with_type(type, [&](auto of) {
    using T = typename decltype(of)::Type;
    p.is_general() ? step_form<T, true>(p) : step_form<T, false>(p);
  });
  return nullptr;
}

const char* launch_pieces(const StepParams& p, Type in, Type out, Pass pass, bool, void*) {
  ++launches;
  with_types(in, out, [&](auto of_in, auto of_out) {
    using In = typename decltype(of_in)::Type;
    using Out = typename decltype(of_out)::Type;
    if (pass == Pass::kFirst)
      step<In, Out, Form::kFirstPieces, false>(p);
    else
      step<In, Out, Form::kLaterPieces, false>(p);
  });
  return nullptr;
}

const char* launch_features_gelu(const FeaturesGeluParams& p, Type type, void*) {
  ++launches;
  with_type(type, [&](auto of) {
    using T = typename decltype(of)::Type;
    with_pairs(p.width, [&](auto pairs) {
      for (int64_t i = 0; i < p.tokens * p.heads; ++i) map_head<T, decltype(pairs)::value>(p, i);
    });
    gelu<T>(p);
  });
  return nullptr;
}

const char* launch_attention_gelu(const StepParams& p, const FeaturesGeluParams& m, Type type,
                                  void*) {
  ++launches;
  with_type(type, [&](auto of) {
    using T = typename decltype(of)::Type;
    with_head_shape(m.width, [&](auto shape) {
      using TileShape = decltype(shape);
      for (int64_t i = 0; i < num_blocks<TileShape>(p); ++i) {
        Block<MappingThread<T, TileShape>, TileShape> block;
        if (p.delayed.keys)
          run_attention_block<TileShape, true>(p, m, i, block);
        else
          run_attention_block<TileShape, false>(p, m, i, block);
      }
    });
    gelu<T>(m);
  });
  return nullptr;
}

const char* launch_map_gelu(const MapParams& p, Type type, void*) {
  ++launches;
  with_type(type, [&](auto of) {
    using T = typename decltype(of)::Type;
    for (int64_t i = 0; i < p.tokens * p.heads; ++i) {
      MapBlock<T> block(p, i);
      run_map_block(p, block.shared, block);
    }
    gelu<T>(p);
  });
  return nullptr;
}

const char* launch_divide(const DivideParams& p, Type type, void*) {
  ++launches;
  with_type(type, [&](auto of) {
    // all threads of the blocks, those beyond the last element too
    const int64_t threads = (num_quotients(p) + kThreads - 1) / kThreads * kThreads;
    for (int64_t i = 0; i < threads; ++i) divide<typename decltype(of)::Type>(p, i);
  });
  return nullptr;
}

const char* launch_fold(const StepParams& p, void*) {
  ++launches;
  with_tile_shape(p.key_width, [&](auto shape) {
    using TileShape = decltype(shape);
    for (int64_t i = 0; i < num_blocks<TileShape>(p); ++i) {
      Block<Thread<float, float, TileShape>, TileShape> block;
      run_fold_block<TileShape>(p, i, block);
    }
  });
  return nullptr;
}

const char* launch_add_layer_norm(const AddLayerNormParams& p, Type y, Type out, void*) {
  ++launches;
  with_type(y, [&](auto of_y) {
    with_type(out, [&](auto of_out) {
      for (int64_t row = 0; row < p.rows; ++row) {
        NormBlock<typename decltype(of_y)::Type, typename decltype(of_out)::Type> block;
        run_norm_block(p, row, block);
      }
    });
  });
  return nullptr;
}

}  // namespace cottention::cuda

STABLE_TORCH_LIBRARY(cottention_on_host, m) {
  for (const char* schema : cottention::kCudaSchemas) m.def(schema);
}
STABLE_TORCH_LIBRARY_IMPL(cottention_on_host, CPU, m) { cottention::cuda::register_all(m); }

// Kernels that the ops have enqueued so far.
extern "C" __attribute__((visibility("default"))) int64_t num_launches() { return cottention::cuda::launches; }
