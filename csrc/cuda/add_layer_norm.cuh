// x ← x + y and a layer norm of the sum, as the code of one CUDA thread.
//
// A block has one row, a thread some quads of it. Sums run over the elements of a thread first, then
// over the lanes of a warp, pairwise, then over the warps. A thread reads x again rather than keep
// it, so that rows may be of any length; it is in the cache.
#pragma once

#include "memory.cuh"
#include "params.h"

namespace cottention::cuda {

// One thread; Y is the type of y, Out that of the output.
template <class Y, class Out>
struct NormThread {
  int thread;
  float sum;

  COTTENTION_HD explicit NormThread(int index) : thread(index) {}

  // Calls visit(first column, number of columns) for each quad of the thread.
  template <class Visit>
  COTTENTION_HD void for_each_quad(const AddLayerNormParams& p, const Visit& visit) const {
    for (int column = 4 * thread; column < p.columns; column += 4 * kThreads)
      visit(column, int(min(4, p.columns - column)));
  }
  template <class T>
  COTTENTION_HD static Quad load(const AddLayerNormParams& p, const T* from, int count) {
    if (p.is_aligned) return load_input(from, true);
    Quad quad{};
    for (int i = 0; i < count; ++i) quad.x[i] = float(from[i]);
    return quad;
  }
  template <class T>
  COTTENTION_HD static void store(const AddLayerNormParams& p, T* to, const Quad& quad, int count) {
    if (p.is_aligned) return store_output(to, quad, true);
    for (int i = 0; i < count; ++i) to[i] = T(quad.x[i]);
  }
  COTTENTION_HD static float* x(const AddLayerNormParams& p, int64_t row) {
    return p.x + row * p.columns;
  }

  // Adds y; `sum` gets this thread's part of the sum of the row.
  COTTENTION_HD void add(const AddLayerNormParams& p, int64_t row) {
    sum = 0.0f;
    for_each_quad(p, [&](int column, int count) {
      Quad quad = load(p, x(p, row) + column, count);
      if (p.y) {
        const Y* y = static_cast<const Y*>(p.y) + row * p.columns + column;
        const Quad added = load(p, y, count);
        COTTENTION_UNROLL
        for (int i = 0; i < 4; ++i) quad.x[i] += added.x[i];
        store(p, x(p, row) + column, quad, count);
      }
      COTTENTION_UNROLL
      for (int i = 0; i < 4; ++i) sum += quad.x[i];
    });
  }

  // `sum` gets this thread's part of the sum of squared deviations.
  COTTENTION_HD void add_squares(const AddLayerNormParams& p, int64_t row, float mean) {
    sum = 0.0f;
    for_each_quad(p, [&](int column, int count) {
      const Quad quad = load(p, x(p, row) + column, count);
      for (int i = 0; i < count; ++i) sum += (quad.x[i] - mean) * (quad.x[i] - mean);
    });
  }

  COTTENTION_HD void write(const AddLayerNormParams& p, int64_t row, float mean,
                           float variance) const {
    const float scale = 1.0f / sqrtf(variance + p.epsilon);
    for_each_quad(p, [&](int column, int count) {
      Quad quad = load(p, x(p, row) + column, count);
      const Quad weight = load(p, p.weight + column, count), bias = load(p, p.bias + column, count);
      COTTENTION_UNROLL
      for (int i = 0; i < 4; ++i) quad.x[i] = (quad.x[i] - mean) * scale * weight.x[i] + bias.x[i];
      store(p, static_cast<Out*>(p.out) + row * p.columns + column, quad, count);
    });
  }
};

// The work of a block. A Team is its threads, as in recurrent.cuh; total() is the sum over them.
template <class Team>
COTTENTION_HD void run_norm_block(const AddLayerNormParams& p, int64_t row, Team& team) {
  team.add(p, row);
  const float mean = team.total() / float(p.columns);
  team.add_squares(p, row, mean);
  const float variance = team.total() / float(p.columns);
  team.write(p, row, mean, variance);
}

}  // namespace cottention::cuda
