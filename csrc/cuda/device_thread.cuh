// A thread of recurrent.cuh on the GPU: sums are reduced by shuffles, and z is stored behind a
// barrier.
#pragma once

#include "launch.cuh"
#include "recurrent.cuh"

namespace cottention::cuda {

template <class Base, class TileShape>
struct DeviceThread : Base {
  using Base::Base;

  template <int kCount>
  __device__ static void reduce(float (&sums)[kCount]) {
#pragma unroll
    for (int distance = TileShape::kLanes / 2; distance > 0; distance /= 2)
#pragma unroll
      for (float& sum : sums) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  __device__ void reduce() { reduce(this->sums); }
  __device__ void reduce_reads() { reduce(this->reads); }
  __device__ void reduce_squares() { reduce(this->squares); }
  __device__ void await_inputs() { await_kernel_before(); }

  __device__ void sync_and_store_z(const StepParams& p) {
    __syncthreads();
    this->store_z(p);
  }
};

}  // namespace cottention::cuda
