// Loads and stores of four elements, and macros that differ between nvcc and a host compiler.
#pragma once

#include <math.h>
#include <stdint.h>

#include "../kernels.h"

#ifdef __CUDACC__
#define COTTENTION_HD __host__ __device__ __forceinline__
#define COTTENTION_UNROLL _Pragma("unroll")
#else
#define COTTENTION_HD inline
#define COTTENTION_UNROLL
#endif

namespace cottention::cuda {

constexpr int kThreads = 128;  // per block

COTTENTION_HD int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

struct alignas(16) Quad {
  float x[4];
};

// Streaming loads and stores: the state is used once and must not evict the weights from the cache.
COTTENTION_HD Quad load_state(const float* from) {
#ifdef __CUDA_ARCH__
  const float4 four = __ldcs(reinterpret_cast<const float4*>(from));
  return {{four.x, four.y, four.z, four.w}};
#else
  return *reinterpret_cast<const Quad*>(from);
#endif
}

COTTENTION_HD void store_state(float* to, const Quad& quad) {
#ifdef __CUDA_ARCH__
  __stcs(reinterpret_cast<float4*>(to), make_float4(quad.x[0], quad.x[1], quad.x[2], quad.x[3]));
#else
  *reinterpret_cast<Quad*>(to) = quad;
#endif
}

template <class T>
COTTENTION_HD Quad load_input(const T* from, bool is_aligned) {
  struct alignas(4 * sizeof(T)) Four {
    T x[4];
  } four;
  if (is_aligned) {
    four = *reinterpret_cast<const Four*>(from);
  } else {
    COTTENTION_UNROLL
    for (int i = 0; i < 4; ++i) four.x[i] = from[i];
  }
  return {{float(four.x[0]), float(four.x[1]), float(four.x[2]), float(four.x[3])}};
}

template <class T>
COTTENTION_HD void store_output(T* to, const Quad& quad, bool is_aligned) {
  struct alignas(4 * sizeof(T)) Four {
    T x[4];
  } four;
  COTTENTION_UNROLL
  for (int i = 0; i < 4; ++i) four.x[i] = T(quad.x[i]);
  if (is_aligned) {
    *reinterpret_cast<Four*>(to) = four;
  } else {
    COTTENTION_UNROLL
    for (int i = 0; i < 4; ++i) to[i] = four.x[i];
  }
}

}  // namespace cottention::cuda
