// The product x Wᵀ + bias with a fixed order of summation: every output is one chain of
// multiply-adds over the channels, whatever the number of rows.
//
// A panel of 64 output columns is multiplied with a few rows of x whose sums stay in registers.
// Channels are processed in blocks, so that a block of a panel stays in the L1 cache for all rows
// of the task; between blocks the sums are kept in a float32 tile, which leaves the chain
// unchanged. Each group of rows prefetches a part of the next block, so that loads overlap with
// arithmetic. Float32 and bfloat16 weights, and float32 ones that are kept in bfloat16 because that
// loses nothing, differ in the word type alone (bfloat16.h). Included by kernels.cpp only.
#pragma once

#include "bfloat16.h"
#include "kernels.h"
#include "prefetch.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

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

constexpr int64_t kBlock = 64;   // words of a panel: half of a small L1 cache
constexpr int64_t kFewRows = 4;  // up to this many, reading the weights takes longest

// Rows of words, `stride` words apart.
struct RowBlock {
  const float* words;
  int64_t stride;
};

// A block of words of a panel, and the columns [first, last) of the next block to prefetch.
struct PanelBlock {
  const float* data;
  int64_t words, first_prefetched, last_prefetched;
};

// Adds the block's terms to the sums of R rows and across(R) × 16 columns from `column` on.
template <class Word, int R>
inline void extend_chains(const RowBlock& x, const PanelBlock& block, int64_t column, float* tile) {
  constexpr int A = across(R);
  Lanes sums[R][A];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a) sums[r][a] = load(tile + r * kPanel + a * kLanes);
  const int64_t end = column + A * kLanes;
  const int64_t first = block.first_prefetched > column ? block.first_prefetched : column;
  const int64_t last = min(block.last_prefetched, end);
  const float* panel = block.data + column;
  const float* next = block.data + block.words * kPanel;
  for (int64_t c = 0; c < block.words; ++c, panel += kPanel, next += kPanel) {
    for (int64_t j = first; j < last; j += kLanes) __builtin_prefetch(next + j, 0, 2);
    Lanes weights[A];
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a) weights[a] = load(panel + a * kLanes);
#pragma GCC unroll 2
    for (int i = 0; i < Word::kRowWords; ++i) {
      Lanes part[A];
#pragma GCC unroll 4
      for (int a = 0; a < A; ++a) part[a] = Word::part(weights[a], i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Lanes value = broadcast(x.words[r * x.stride + c * Word::kRowWords + i]);
#pragma GCC unroll 4
        for (int a = 0; a < A; ++a) sums[r][a] = Word::multiply_add(part[a], value, sums[r][a]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a) store(tile + r * kPanel + a * kLanes, sums[r][a]);
}

template <class Word, int R>
inline void extend_rows(const RowBlock& x, const PanelBlock& block, float* tile) {
  for (int64_t column = 0; column < kPanel; column += across(R) * kLanes)
    extend_chains<Word, R>(x, block, column, tile + column);
}

using ExtendRows = void (*)(const RowBlock&, const PanelBlock&, float*);

template <class Word>
inline ExtendRows extend_rows_for(int64_t rows) {
#if defined(__AVX2__)
  static constexpr ExtendRows table[] = {extend_rows<Word, 1>, extend_rows<Word, 2>,
                                         extend_rows<Word, 3>, extend_rows<Word, 4>,
                                         extend_rows<Word, 5>, extend_rows<Word, 6>};
#else
  static constexpr ExtendRows table[] = {extend_rows<Word, 1>, extend_rows<Word, 2>};
#endif
  static_assert(sizeof table / sizeof *table == kMaxRows);
  return table[rows - 1];
}

// One block of words for few rows.
template <class Word>
inline void extend_few(const RowBlock& x, const PanelBlock& block, int64_t rows, float* tile) {
  for (int64_t row = 0; row < rows; row += kMaxRows) {
    const int64_t count = min(rows - row, kMaxRows);
    extend_rows_for<Word>(count)({x.words + row * x.stride, x.stride}, block, tile + row * kPanel);
  }
}

// One block of words for all rows of a task, in groups of nearly equal size.
template <class Word>
inline void extend_many(const RowBlock& x, PanelBlock block, int64_t rows, float* tile) {
  const int64_t groups = (rows + kMaxRows - 1) / kMaxRows;
  constexpr int64_t lines = kPanel / kLanes;
  for (int64_t g = 0, row = 0; g < groups; ++g) {
    const int64_t count = (rows - row + groups - g - 1) / (groups - g);
    block.first_prefetched = g * lines / groups * kLanes;
    block.last_prefetched = (g + 1) * lines / groups * kLanes;
    const RowBlock group{x.words + row * x.stride, x.stride};
    extend_rows_for<Word>(count)(group, block, tile + row * kPanel);
    row += count;
  }
}

inline void write_rows(const LinearParams& p, int64_t first, int64_t rows, int64_t column,
                       const float* tile) {
  const int64_t count = min(p.columns - column, kPanel);
  for (int64_t r = 0; r < rows; ++r) {
    float* out = p.out + (first + r) * p.columns + column;
    for (int64_t j = 0; j < count; ++j) {
      const float sum = p.bias ? tile[r * kPanel + j] + p.bias[column + j] : tile[r * kPanel + j];
      out[j] = p.adds ? out[j] + sum : sum;
    }
  }
}

template <class Word>
inline void linear(const LinearParams& p, int64_t task) {
  alignas(64) float tile[kTaskRows * kPanel];
  const int64_t panel = task / p.blocks();  // stays in the L2 cache for all its rows
  const int64_t block_of_rows = task % p.blocks();
  const int64_t first = p.rows * block_of_rows / p.blocks();
  const int64_t rows = p.rows * (block_of_rows + 1) / p.blocks() - first;
  __builtin_memset(tile, 0, rows * kPanel * sizeof(float));
  for (int64_t w = 0; w < p.words; w += kBlock) {
    const RowBlock x{p.x + first * p.x_stride + w * Word::kRowWords, p.x_stride};
    const float* weights = p.packed + (panel * p.words + w) * kPanel;
    const PanelBlock block{weights, min(p.words - w, kBlock), 0, 0};
    if (rows > kFewRows) {
      extend_many<Word>(x, block, rows, tile);
    } else {
      if (p.prefetches) prefetch_pages(block.data, block.words * kPanel);
      extend_few<Word>(x, block, rows, tile);
    }
  }
  write_rows(p, first, rows, panel * kPanel, tile);
}

}  // namespace cottention::COTTENTION_ISA
