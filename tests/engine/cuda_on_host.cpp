// The CUDA ops on a host: the threads of a block in turn, through the same functions.
//
// A shuffle becomes an exchange between array elements, a barrier the end of a loop. Registers
// start as NaN, so that a read before the first write shows.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <limits>
#include <vector>

#include "../../csrc/cuda/features_gelu.cuh"
#include "../../csrc/cuda/recurrent.cuh"

namespace cottention::cuda {
namespace {

constexpr float kUnset = std::numeric_limits<float>::quiet_NaN();

// A butterfly shuffle and sum of one number per lane: adds that of the lane at `distance`.
template <int kCount, class Get>
void exchange(int distance, const Get& get) {
  std::array<float, kCount> before;
  for (int i = 0; i < kCount; ++i) before[i] = get(i);
  for (int i = 0; i < kCount; ++i) get(i) += before[i ^ distance];
}

template <class In, class Out, class TileShape>
struct Block {
  using DeviceThread = Thread<In, Out, TileShape>;
  std::vector<DeviceThread> threads;

  Block() {
    for (int i = 0; i < kThreads; ++i) {
      DeviceThread thread(i);
      for (float& sum : thread.sums) sum = kUnset;
      for (float& sum : thread.reads) sum = kUnset;
      for (auto& row : thread.h)
        for (Quad& quad : row) quad = {{kUnset, kUnset, kUnset, kUnset}};
      for (Quad& quad : thread.z) quad = {{kUnset, kUnset, kUnset, kUnset}};
      threads.push_back(thread);
    }
  }
  void load(const StepParams& p, const BlockTask& task, int tile) {
    for (auto& thread : threads) thread.load(p, task, tile);
  }
  void advance(const StepParams& p, const BlockTask& task, int64_t token) {
    for (auto& thread : threads) thread.advance(p, task, token);
  }
  void reduce() {
    for (int distance = TileShape::kLanes / 2; distance > 0; distance /= 2)
      for (int s = 0; s < DeviceThread::kSums; ++s)
        exchange<kThreads>(distance, [&](int i) -> float& { return threads[i].sums[s]; });
  }
  void read(const StepParams& p, const BlockTask& task, int64_t token) {
    for (auto& thread : threads) thread.read(p, task, token);
  }
  void reduce_reads() {
    for (int distance = TileShape::kLanes / 2; distance > 0; distance /= 2)
      for (int s = 0; s < TileShape::kRows; ++s)
        exchange<kThreads>(distance, [&](int i) -> float& { return threads[i].reads[s]; });
  }
  void advance_general(const StepParams& p, const BlockTask& task, int64_t token) {
    for (auto& thread : threads) thread.advance_general(p, task, token);
  }
  void write(const StepParams& p, const BlockTask& task, int64_t token) {
    for (auto& thread : threads) thread.write(p, task, token);
  }
  void store(const StepParams& p) {
    for (auto& thread : threads) thread.store(p);
  }
  void sync_and_store_z(const StepParams& p, const BlockTask& task) {
    for (auto& thread : threads) thread.store_z(p, task);
  }
  void clear(const StepParams& p, const BlockTask& task) {
    for (auto& thread : threads) thread.clear(p, task);
  }
};

template <class In, class Out, class TileShape, bool kIsGeneral>
void step_block(const StepParams& p, int64_t index) {
  Block<In, Out, TileShape> block;
  if (p.cu_seqlens)
    run_block<TileShape, false, kIsGeneral>(p, index, block);
  else
    run_block<TileShape, true, kIsGeneral>(p, index, block);
}

template <class In, class Out>
void step(const StepParams& p) {
  with_tile_shape(p.key_width, [&](auto shape) {
    using TileShape = decltype(shape);
    for (int64_t i = 0; i < num_blocks<TileShape>(p); ++i)
      p.is_general() ? step_block<In, Out, TileShape, true>(p, i)
                     : step_block<In, Out, TileShape, false>(p, i);
  });
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

template <class T>
void features_gelu(const FeaturesGeluParams& p) {
  with_pairs(p.width, [&](auto pairs) {
    for (int64_t i = 0; i < p.tokens * p.heads; ++i) map_head<T, decltype(pairs)::value>(p, i);
  });
  for (int64_t i = 0; i < p.tokens * gelu_blocks_of_token(p); ++i)
    for (int thread = 0; thread < kThreads; ++thread) gelu_block<T>(p, i, thread);
}

}  // namespace

const char* launch_step(const StepParams& p, Type in, Type out, void*) {
  const bool is_wide = in == Type::kFloat;
  if (out == Type::kFloat) step<float, float>(p);
  if (out == Type::kBFloat16 && is_wide) step<float, c10::BFloat16>(p);
  if (out == Type::kBFloat16 && !is_wide) step<c10::BFloat16, c10::BFloat16>(p);
  if (out == Type::kHalf && is_wide) step<float, c10::Half>(p);
  if (out == Type::kHalf && !is_wide) step<c10::Half, c10::Half>(p);
  return nullptr;
}

const char* launch_features_gelu(const FeaturesGeluParams& p, Type type, void*) {
  if (type == Type::kFloat) features_gelu<float>(p);
  if (type == Type::kBFloat16) features_gelu<c10::BFloat16>(p);
  if (type == Type::kHalf) features_gelu<c10::Half>(p);
  return nullptr;
}

}  // namespace cottention::cuda

namespace cuda = cottention::cuda;

extern "C" void step_on_host(const cuda::StepParams* p, int in, int out) {
  cuda::launch_step(*p, cuda::Type(in), cuda::Type(out), nullptr);
}

extern "C" void features_gelu_on_host(const cuda::FeaturesGeluParams* p, int type) {
  cuda::launch_features_gelu(*p, cuda::Type(type), nullptr);
}
