// The Cottention feature map (rotary, unit norm, scaling by position) and the MLP's gelu, as the
// code of one CUDA thread. A host compiler takes it as well.
//
// A warp has one head of one token, a lane some of its pairs (2i, 2i + 1). Sums of squares run over
// the elements of a lane first and then over the lanes, pairwise.
#pragma once

#include <type_traits>

#include "memory.cuh"
#include "params.h"

namespace cottention::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

COTTENTION_HD int64_t num_head_blocks(const FeaturesGeluParams& p) {
  return (p.tokens * p.heads + kWarps - 1) / kWarps;
}

COTTENTION_HD int64_t gelu_blocks_of_token(const FeaturesGeluParams& p) {
  return (p.inner + 4 * kThreads - 1) / (4 * kThreads);
}

COTTENTION_HD float gelu_new(float x) {
  const float inside = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return 0.5f * x * (1.0f + tanhf(inside));
}

// The four elements of gelu of a thread in gelu block `block`.
template <class T>
COTTENTION_HD void gelu_block(const FeaturesGeluParams& p, int64_t block, int thread) {
  const int64_t blocks = gelu_blocks_of_token(p), token = block / blocks;
  const int64_t column = (block % blocks * kThreads + thread) * 4;
  const T* from = static_cast<const T*>(p.up) + token * p.up_stride + column;
  T* to = static_cast<T*>(p.gelu) + token * p.gelu_stride + column;
  if (column + 4 <= p.inner) {
    Quad quad = load_input(from, p.is_aligned);
    COTTENTION_UNROLL
    for (int i = 0; i < 4; ++i) quad.x[i] = gelu_new(quad.x[i]);
    store_output(to, quad, p.is_aligned);
  } else {
    for (int64_t i = 0; column + i < p.inner; ++i) to[i] = T(gelu_new(float(from[i])));
  }
}

// The Euclidean norm that q and k are divided by, from the sum of their squares.
COTTENTION_HD float norm(float sum) {
  const float root = sqrtf(sum);
  return root < kNormFloor ? kNormFloor : root;
}

// What v is divided by: the position, counted from 1, to the power of the head's sigma.
COTTENTION_HD float position_power(const FeaturesGeluParams& p, int64_t token, int head) {
  return powf(float(p.positions[token] + 1), float(p.sigma[head]));
}

struct Pair {
  float a, b;
};

// One lane of a warp, with up to kPairs pairs of a head. T is the type of q, k and v.
template <class T, int kPairs>
struct Lane {
  int lane;
  int64_t token;
  int head;
  Pair q[kPairs], k[kPairs], v[kPairs];
  float sums[2];  // of squares of q and of k

  COTTENTION_HD Lane(const FeaturesGeluParams& p, int64_t warp, int index)
      : lane(index), token(warp / p.heads), head(int(warp % p.heads)) {}

  COTTENTION_HD int pair(int i) const { return lane + i * kWarp; }
  COTTENTION_HD bool has(const FeaturesGeluParams& p, int i) const { return 2 * pair(i) < p.width; }

  COTTENTION_HD Pair load(const View& x, int i) const {
    const T* from = static_cast<const T*>(x.data) + token * x.token_stride + head * x.head_stride;
    return {float(from[2 * pair(i)]), float(from[2 * pair(i) + 1])};
  }
  COTTENTION_HD void store(const FeaturesGeluParams& p, float* out, int i, const Pair& x) const {
    float* to = out + (token * p.heads + head) * p.width + 2 * pair(i);
    to[0] = x.a;
    to[1] = x.b;
  }

  COTTENTION_HD Pair rotated(const FeaturesGeluParams& p, const Pair& x, int i) const {
    if (pair(i) >= p.pairs) return x;
    const float cos = p.cos[token * p.pairs + pair(i)], sin = p.sin[token * p.pairs + pair(i)];
    return {x.a * cos - x.b * sin, x.b * cos + x.a * sin};
  }

  COTTENTION_HD void read(const FeaturesGeluParams& p) {
    sums[0] = sums[1] = 0.0f;
    COTTENTION_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      if (!has(p, i)) break;
      q[i] = rotated(p, load(p.q, i), i);
      k[i] = rotated(p, load(p.k, i), i);
      v[i] = load(p.v, i);
      sums[0] += q[i].a * q[i].a + q[i].b * q[i].b;
      sums[1] += k[i].a * k[i].a + k[i].b * k[i].b;
    }
  }

  COTTENTION_HD static Pair divided(const Pair& x, float by) { return {x.a / by, x.b / by}; }

  // Normalises, scales and stores; the sums must be reduced over the warp.
  COTTENTION_HD void write(const FeaturesGeluParams& p) const {
    const float q_norm = norm(sums[0]), k_norm = norm(sums[1]);
    const float below = position_power(p, token, head);
    COTTENTION_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      if (!has(p, i)) break;
      store(p, p.q_out, i, divided(q[i], q_norm));
      store(p, p.k_out, i, divided(k[i], k_norm));
      store(p, p.v_out, i, divided(v[i], below));
    }
  }
};

// Calls visit(integral constant) with the pairs per lane, for heads of up to 256 channels.
template <class Visit>
void with_pairs(int width, const Visit& visit) {
  if (width <= 2 * kWarp) return visit(std::integral_constant<int, 1>{});
  if (width <= 4 * kWarp) return visit(std::integral_constant<int, 2>{});
  return visit(std::integral_constant<int, 4>{});
}

}  // namespace cottention::cuda
