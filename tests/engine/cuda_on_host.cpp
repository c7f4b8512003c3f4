// The CUDA step on a host: a block's threads one after the other, through the same functions.
//
// Owns what replaces the GPU: the shuffle becomes an exchange between array elements, the barrier
// the end of a loop. Registers begin as NaN, so that reading one that was never written shows.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <limits>
#include <vector>

#include "../../csrc/cuda/recurrent.cuh"

namespace cottention::cuda {
namespace {

constexpr float kUnset = std::numeric_limits<float>::quiet_NaN();

template <class T, class Shape>
struct Block {
  std::vector<Thread<T, Shape>> threads;

  Block() {
    for (int i = 0; i < kThreads; ++i) {
      Thread<T, Shape> thread(i);
      for (float& sum : thread.sums) sum = kUnset;
      for (auto& row : thread.h)
        for (Quad& quad : row) quad = {{kUnset, kUnset, kUnset, kUnset}};
      for (Quad& quad : thread.z) quad = {{kUnset, kUnset, kUnset, kUnset}};
      threads.push_back(thread);
    }
  }
  void load(const StepParams& p, const Place& at, int tile) {
    for (auto& thread : threads) thread.load(p, at, tile);
  }
  void advance(const StepParams& p, const Place& at, int64_t token) {
    for (auto& thread : threads) thread.advance(p, at, token);
  }
  void fold() {
    for (int distance = Shape::kLanes / 2; distance > 0; distance /= 2)
      for (int s = 0; s < Thread<T, Shape>::kSums; ++s) {
        std::array<float, kThreads> before;
        for (int i = 0; i < kThreads; ++i) before[i] = threads[i].sums[s];
        for (int i = 0; i < kThreads; ++i) threads[i].sums[s] += before[i ^ distance];
      }
  }
  void write(const StepParams& p, const Place& at, int64_t token) {
    for (auto& thread : threads) thread.write(p, at, token);
  }
  void store(const StepParams& p) {
    for (auto& thread : threads) thread.store(p);
  }
  void settle(const StepParams& p, const Place& at) {
    for (auto& thread : threads) thread.store_z(p, at);
  }
  void clear(const StepParams& p, const Place& at) {
    for (auto& thread : threads) thread.clear(p, at);
  }
};

template <class T>
void run(const StepParams& p) {
  with_shape(p.key_width, [&](auto shape) {
    using Shape = decltype(shape);
    for (int64_t i = 0; i < num_blocks<Shape>(p); ++i) {
      Block<T, Shape> block;
      if (p.offsets)
        run_block<Shape, false>(p, i, block);
      else
        run_block<Shape, true>(p, i, block);
    }
  });
}

}  // namespace
}  // namespace cottention::cuda

extern "C" __attribute__((visibility("default"))) void step_on_host(
    const cottention::cuda::StepParams* p, int type) {
  using cottention::cuda::Type;
  if (Type(type) == Type::kFloat) cottention::cuda::run<float>(*p);
  if (Type(type) == Type::kBFloat16) cottention::cuda::run<c10::BFloat16>(*p);
  if (Type(type) == Type::kHalf) cottention::cuda::run<c10::Half>(*p);
}
