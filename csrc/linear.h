// The product x Wᵀ + bias in one order: every output is a single chain over the channels.
//
// A panel of 64 output columns meets a few rows of x whose sums stay in registers. Channels are
// taken in blocks so that a panel's block stays in the first cache while all rows of the task pass
// it; between blocks the sums rest in a tile of float32, which leaves the chain as it was.
// Included by kernels.cpp only.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

constexpr int64_t kChannelBlock = 128;

#if defined(__AVX512F__)
constexpr int kMaxRows = 6;
constexpr int across(int) { return 4; }
#elif defined(__AVX2__)
constexpr int kMaxRows = 6;
constexpr int across(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#else
constexpr int kMaxRows = 2;
constexpr int across(int rows) { return rows == 1 ? 2 : 1; }
#endif

// Adds `channels` terms to the sums of R rows and across(R) × 16 columns at `tile`.
template <int R>
inline void extend_chains(const float* x, int64_t x_stride, const float* panel, int64_t channels,
                          float* tile) {
  constexpr int A = across(R);
  Lanes sums[R][A];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a) sums[r][a] = load(tile + r * kPanel + a * kLanes);
  for (int64_t c = 0; c < channels; ++c, panel += kPanel) {
    Lanes weights[A];
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a) weights[a] = load(panel + a * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Lanes value = broadcast(x[r * x_stride + c]);
#pragma GCC unroll 4
      for (int a = 0; a < A; ++a) sums[r][a] = multiply_add(weights[a], value, sums[r][a]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a) store(tile + r * kPanel + a * kLanes, sums[r][a]);
}

template <int R>
inline void extend_rows(const float* x, int64_t x_stride, const float* panel, int64_t channels,
                        float* tile) {
  for (int64_t column = 0; column < kPanel; column += across(R) * kLanes)
    extend_chains<R>(x, x_stride, panel + column, channels, tile + column);
}

using ExtendRows = void (*)(const float*, int64_t, const float*, int64_t, float*);

inline ExtendRows extend_rows_for(int64_t rows) {
#if defined(__AVX2__)
  static constexpr ExtendRows table[] = {extend_rows<1>, extend_rows<2>, extend_rows<3>,
                                         extend_rows<4>, extend_rows<5>, extend_rows<6>};
#else
  static constexpr ExtendRows table[] = {extend_rows<1>, extend_rows<2>};
#endif
  static_assert(sizeof table / sizeof *table == kMaxRows);
  return table[rows - 1];
}

// One block of channels for all rows of a task, in groups of nearly equal size.
inline void extend_task(const LinearParams& p, const float* x, const float* panel, int64_t rows,
                        int64_t channels, float* tile) {
  const int64_t groups = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t g = 0, row = 0; g < groups; ++g) {
    const int64_t count = (rows - row + groups - g - 1) / (groups - g);
    extend_rows_for(count)(x + row * p.x_stride, p.x_stride, panel, channels, tile + row * kPanel);
    row += count;
  }
}

inline void write_rows(const LinearParams& p, int64_t first, int64_t rows, int64_t column,
                       const float* tile) {
  const int64_t left = p.columns - column;
  const int64_t count = left < kPanel ? left : kPanel;
  for (int64_t r = 0; r < rows; ++r) {
    float* out = p.out + (first + r) * p.columns + column;
    for (int64_t j = 0; j < count; ++j)
      out[j] = p.bias ? tile[r * kPanel + j] + p.bias[column + j] : tile[r * kPanel + j];
  }
}

inline void linear(const LinearParams& p, int64_t task) {
  alignas(64) float tile[kTaskRows * kPanel];
  const int64_t panel = task / p.row_tasks();
  const int64_t first = task % p.row_tasks() * kTaskRows;
  const int64_t rows = p.rows - first < kTaskRows ? p.rows - first : kTaskRows;
  __builtin_memset(tile, 0, rows * kPanel * sizeof(float));
  for (int64_t c = 0; c < p.channels; c += kChannelBlock) {
    const int64_t left = p.channels - c;
    extend_task(p, p.x + first * p.x_stride + c, p.packed + (panel * p.channels + c) * kPanel, rows,
                left < kChannelBlock ? left : kChannelBlock, tile);
  }
  write_rows(p, first, rows, panel * kPanel, tile);
}

}  // namespace cottention::COTTENTION_ISA
