// The product x Wᵀ + bias with a fixed order of summation: every output is one chain of
// multiply-adds over the channels, whatever the number of rows.
//
// A panel of 64 output columns is multiplied with a few rows of x whose sums stay in registers.
// Channels are processed in blocks, so that a block of a panel stays in a cache for all rows of the
// task; between blocks the sums are kept in a float32 tile, which leaves the chain unchanged. Each
// group of rows prefetches a part of the next block, so that loads overlap with arithmetic. Float32
// and bfloat16 weights, and float32 ones that are kept in bfloat16 because that loses nothing,
// differ in the word type alone (bfloat16.h). Compressed weights are decoded to words of bfloat16,
// in registers for few rows and a block at a time for many (compressed.h). With weights of eight
// bits the chain is one of groups (eight_bits.h). Included by kernels.cpp only.
#pragma once

#include "bfloat16.h"
#include "compressed.h"
#include "eight_bits.h"
#include "kernels.h"
#include "prefetch.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

constexpr int64_t kLine = 16;  // words of a cache line

// How a type of weights is divided: a unit is what cannot be divided.
template <class Word>
struct Units {
  static constexpr int64_t kWords = 1, kRowWords = Word::kRowWords;
  static constexpr int64_t kBlock = 64;  // words of a block of a panel: half of a small L1 cache
  // Above kSmallBlockRows: a quarter of a small L2 cache.
  static constexpr int64_t kLargeBlock = 256;
};
template <>
struct Units<EightBits> {
  static constexpr int64_t kWords = kGroupWords, kRowWords = EightBits::kRowGroup;
  // A group's sums are in the tile after it in any case, so that a larger block gains nothing.
  static constexpr int64_t kBlock = 4 * kGroupWords, kLargeBlock = kBlock;
};

// Rows of words, `stride` words apart.
struct RowBlock {
  const float* words;
  int64_t stride;
};

// A block of words of a panel. `lines` cache lines from `next` on, which will be needed after it,
// are prefetched meanwhile.
struct PanelBlock {
  const float* data;
  int64_t words;
  const float* next;
  int64_t lines;
};

// Lines to prefetch, spread over the words of a block: the same line may come twice.
struct Prefetch {
  const float* next;
  int64_t step;  // floats from word to word

  static Prefetch of(const PanelBlock& block, int64_t strip, int64_t strips) {
    const int64_t first = block.lines * strip / strips;
    const int64_t lines = block.lines * (strip + 1) / strips - first;
    return {block.next + first * kLine, (lines * kLine + block.words - 1) / block.words};
  }
  // Those of `count` words from word c on.
  void words(int64_t c, int64_t count) const {
    const float* end = next + (c + count) * step;
    for (const float* p = next + c * step; p < end; p += kLine) __builtin_prefetch(p, 0, 2);
  }
};

// Adds the block's terms to the chains of R rows and A × 16 columns, which `tile` holds.
template <class Word, int R, int A>
inline void extend_chains(const RowBlock& x, const PanelBlock& block, int64_t column, float* tile,
                          const Prefetch& prefetch) {
  Lanes sums[R][A];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a) sums[r][a] = load(tile + r * kPanel + a * kLanes);
  const float *panel = block.data + column, *row = x.words;
  for (int64_t w = 0; w < block.words; ++w, panel += kPanel, row += Word::kRowWords) {
    prefetch.words(w, 1);
    Lanes weights[A];
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a) weights[a] = load(panel + a * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < Word::kRowWords; ++i) {
      Lanes part[A];
#pragma GCC unroll 4
      for (int a = 0; a < A; ++a) part[a] = Word::part(weights[a], i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const float value = row[r * x.stride + Word::place(i)];
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

// Adds the products of `words` words to the sums of R rows and A × 16 columns.
template <int R, int A>
inline void add_words(EightBits::Sum (&sums)[R][A], const RowBlock& x, const float* panel,
                      int64_t words) {
  const float* row = x.words;
#pragma GCC unroll 1  // unrolled, a group took up to a fifth longer
  for (int64_t w = 0; w < words; ++w, panel += kPanel, row += EightBits::kRowWords) {
    EightBits::Weights weights[A];
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a) weights[a] = EightBits::weights(panel + a * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int a = 0; a < A; ++a) EightBits::add_word(weights[a], row + r * x.stride, sums[r][a]);
  }
}

// As extend_chains, a group at a time: each adds its sum times both scales.
template <int R, int A>
inline void extend_groups(const RowBlock& x, const PanelBlock& block, int64_t column, float* tile,
                          const Prefetch& prefetch) {
  constexpr int64_t kAtOnce = 16 / A;  // words whose lines are prefetched before them
  const float* row = x.words;
  const float* panel = block.data + column;
  for (int64_t w = 0; w < block.words; w += kGroupWords) {
    // The scales are read last; in the order of addresses the hardware prefetches what follows.
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a) __builtin_prefetch(panel + a * kLanes);
    EightBits::Sum sums[R][A];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int a = 0; a < A; ++a)
        sums[r][a] = EightBits::start(bits_of(row[r * x.stride + EightBits::kStartAt]));
    prefetch.words(w, 1);  // of scales
#pragma GCC unroll 1
    for (int64_t c = 0; c < kGroupWords - 1; c += kAtOnce) {
      prefetch.words(w + 1 + c, kAtOnce);
      const RowBlock from{row + c * EightBits::kRowWords, x.stride};
      add_words<R, A>(sums, from, panel + (1 + c) * kPanel, kAtOnce);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Lanes own = broadcast(row[r * x.stride + EightBits::kScaleAt]);
#pragma GCC unroll 4
      for (int a = 0; a < A; ++a) {
        float* total = tile + r * kPanel + a * kLanes;
        const Lanes scale = multiply(own, load(panel + a * kLanes));
        store(total, multiply_add(EightBits::to_float(sums[r][a]), scale, load(total)));
      }
    }
    forget_memory();
    row += EightBits::kRowGroup;
    panel += kGroupWords * kPanel;
  }
}

// extend_groups for one row, in the order of addresses: registers hold the scales, which are read
// first, and the chains. What follows the block is left to the hardware.
template <int A>
inline void extend_groups_of_one(const float* row, const PanelBlock& block, int64_t column,
                                 float* tile) {
  const float* panel = block.data + column;
  Lanes total[A];
#pragma GCC unroll 4
  for (int a = 0; a < A; ++a) total[a] = load(tile + a * kLanes);
  for (int64_t w = 0; w < block.words; w += kGroupWords) {
    const Lanes own = broadcast(row[EightBits::kScaleAt]);
    Lanes scale[A];
    EightBits::Sum sums[1][A];
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a) {
      scale[a] = multiply(own, load(panel + a * kLanes));
      sums[0][a] = EightBits::start(bits_of(row[EightBits::kStartAt]));
    }
    add_words<1, A>(sums, {row, 0}, panel + kPanel, kGroupWords - 1);
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a)
      total[a] = multiply_add(EightBits::to_float(sums[0][a]), scale[a], total[a]);
    row += EightBits::kRowGroup;
    panel += kGroupWords * kPanel;
  }
#pragma GCC unroll 4
  for (int a = 0; a < A; ++a) store(tile + a * kLanes, total[a]);
}

template <class Word, int R>
inline void extend_rows(const RowBlock& x, const PanelBlock& block, float* tile) {
  constexpr int A = across(R);
  constexpr int64_t strips = kPanel / (A * kLanes);
  for (int64_t strip = 0; strip < strips; ++strip) {
    const int64_t column = strip * A * kLanes;
    const Prefetch prefetch = Prefetch::of(block, strip, strips);
    if constexpr (Units<Word>::kWords > 1 && R == 1)
      extend_groups_of_one<A>(x.words, block, column, tile + column);
    else if constexpr (Units<Word>::kWords == 1)
      extend_chains<Word, R, A>(x, block, column, tile + column, prefetch);
    else
      extend_groups<R, A>(x, block, column, tile + column, prefetch);
  }
}

using ExtendRows = void (*)(const RowBlock&, const PanelBlock&, float*);

template <class Word, int R>
constexpr ExtendRows extend_rows_or_none() {
  if constexpr (R <= Word::kMaxRows) return extend_rows<Word, R>;
  return nullptr;
}

template <class Word>
inline ExtendRows extend_rows_for(int64_t rows) {
  static constexpr ExtendRows table[] = {
      extend_rows<Word, 1>,           extend_rows_or_none<Word, 2>(), extend_rows_or_none<Word, 3>(),
      extend_rows_or_none<Word, 4>(), extend_rows_or_none<Word, 5>(), extend_rows_or_none<Word, 6>()};
  static_assert(Word::kMaxRows <= sizeof table / sizeof *table);
  return table[rows - 1];
}

// One block of words for few rows.
template <class Word>
inline void extend_few(const RowBlock& x, const PanelBlock& block, int64_t rows, float* tile) {
  for (int64_t row = 0; row < rows; row += Word::kMaxRows) {
    const int64_t count = min(rows - row, Word::kMaxRows);
    extend_rows_for<Word>(count)({x.words + row * x.stride, x.stride}, block, tile + row * kPanel);
  }
}

// Calls each(first row, rows, block) for groups of at most `most` rows, of nearly equal size; each
// is given a part of the lines to prefetch.
template <class Each>
inline void for_each_group(int64_t rows, int64_t most, const PanelBlock& block, const Each& each) {
  const int64_t groups = (rows + most - 1) / most;
  for (int64_t g = 0, row = 0; g < groups; ++g) {
    const int64_t count = (rows - row + groups - g - 1) / (groups - g);
    const int64_t first = block.lines * g / groups, end = block.lines * (g + 1) / groups;
    each(row, count, PanelBlock{block.data, block.words, block.next + first * kLine, end - first});
    row += count;
  }
}

// One block of words for all rows of a task.
template <class Word>
inline void extend_many(const RowBlock& x, const PanelBlock& block, int64_t rows, float* tile) {
  const auto extend = [&](int64_t row, int64_t count, const PanelBlock& own) {
    const RowBlock group{x.words + row * x.stride, x.stride};
    extend_rows_for<Word>(count)(group, own, tile + row * kPanel);
  };
  for_each_group(rows, Word::kMaxRows, block, extend);
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

// The rows of a task and their panel.
struct LinearTask {
  int64_t panel, first, rows;

  static LinearTask of(const LinearParams& p, int64_t task) {
    const int64_t block = task % p.blocks();  // a panel stays in the L2 cache for all its rows
    const int64_t first = p.rows * block / p.blocks();
    return {task / p.blocks(), first, p.rows * (block + 1) / p.blocks() - first};
  }
  const float* weights(const LinearParams& p) const { return p.packed + panel * p.panel_stride; }
  // From word w on.
  template <class Word>
  RowBlock x(const LinearParams& p, int64_t w) const {
    const int64_t place = w / Units<Word>::kWords * Units<Word>::kRowWords;
    return {p.x + first * p.x_stride + place, p.x_stride};
  }
  template <class Word>
  int64_t block_words() const {
    return rows > kSmallBlockRows ? Units<Word>::kLargeBlock : Units<Word>::kBlock;
  }
  void write(const LinearParams& p, const float* tile) const {
    write_rows(p, first, rows, panel * kPanel, tile);
  }
};

template <class Word>
inline void linear(const LinearParams& p, int64_t number) {
  alignas(64) float tile[kTaskRows * kPanel];
  const LinearTask task = LinearTask::of(p, number);
  __builtin_memset(tile, 0, task.rows * kPanel * sizeof(float));
  const int64_t most = task.block_words<Word>();
  for (int64_t w = 0; w < p.words; w += most) {
    const float* weights = task.weights(p) + w * kPanel;
    const int64_t words = min(p.words - w, most), size = words * kPanel;
    const RowBlock x = task.x<Word>(p, w);
    if (task.rows > kFewRows) {
      extend_many<Word>(x, {weights, words, weights + size, size / kLine}, task.rows, tile);
    } else {
      if (p.prefetches) prefetch_pages(weights, size);
      extend_few<Word>(x, {weights, words, weights, 0}, task.rows, tile);
    }
  }
  task.write(p, tile);
}

// Adds the terms of a block of compressed words to the chains of R rows and A × 16 columns, the
// strip of that number.
template <class Word, int R, int A, int kStrip>
inline void extend_strip(const RowBlock& x, CompressedWords from, const PanelBlock& block,
                         float* tile) {
  constexpr int64_t column = kStrip * A * kLanes;
  constexpr int kAtOnce = A < 2 ? A : 2;  // that are decoded before they are multiplied
  const Table table = Table::of(from.table);
  const Prefetch prefetch = Prefetch::of(block, kStrip, kPanel / kLanes / A);
  tile += column;
  Lanes sums[R][A];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a) sums[r][a] = load(tile + r * kPanel + a * kLanes);
  const float* row = x.words;
#pragma GCC unroll 1
  for (int64_t w = 0; w < block.words; ++w, row += Word::kRowWords) {
    if constexpr (R > kFewRows) prefetch.words(w, 1);
    alignas(64) float words[kPanel];
    const uint8_t* bytes = from.bytes;
    const bool is_exceptional = from.is_exceptional();
    if (is_exceptional) [[unlikely]] decode_word(from, table, words);
    else from.next();
#pragma GCC unroll 2
    for (int a0 = 0; a0 < A; a0 += kAtOnce) {
      Lanes weights[kAtOnce];
      if (is_exceptional) [[unlikely]] {
#pragma GCC unroll 2
        for (int a = 0; a < kAtOnce; ++a) weights[a] = load(words + column + (a0 + a) * kLanes);
      } else {
        decode<kAtOnce>(bytes, kStrip * A / kAtOnce + a0 / kAtOnce, table, weights);
      }
#pragma GCC unroll 2
      for (int i = 0; i < Word::kRowWords; ++i)
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const float value = row[r * x.stride + Word::place(i)];
#pragma GCC unroll 2
          for (int a = 0; a < kAtOnce; ++a) {
            Lanes& sum = sums[r][a0 + a];
            sum = Word::multiply_add(Word::part(weights[a], i), value, sum);
          }
        }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a) store(tile + r * kPanel + a * kLanes, sums[r][a]);
}

// The same for all columns of the panel.
template <class Word, int R>
inline void extend_compressed(const RowBlock& x, const CompressedWords& from,
                              const PanelBlock& block, float* tile) {
  constexpr int A = across_compressed(R);
  extend_strip<Word, R, A, 0>(x, from, block, tile);
  if constexpr (A < 4) extend_strip<Word, R, A, 1>(x, from, block, tile);
  if constexpr (A < 2) extend_strip<Word, R, A, 2>(x, from, block, tile);
  if constexpr (A < 2) extend_strip<Word, R, A, 3>(x, from, block, tile);
}

using ExtendCompressed = void (*)(const RowBlock&, const CompressedWords&, const PanelBlock&,
                                  float*);

template <class Word, int R>
constexpr ExtendCompressed extend_compressed_or_none() {
  if constexpr (R <= kMaxRowsOfCompressed) return extend_compressed<Word, R>;
  return nullptr;
}

template <class Word>
inline ExtendCompressed extend_compressed_for(int64_t rows) {
  static constexpr ExtendCompressed table[] = {
      extend_compressed_or_none<Word, 1>(),  extend_compressed_or_none<Word, 2>(),
      extend_compressed_or_none<Word, 3>(),  extend_compressed_or_none<Word, 4>(),
      extend_compressed_or_none<Word, 5>(),  extend_compressed_or_none<Word, 6>(),
      extend_compressed_or_none<Word, 7>(),  extend_compressed_or_none<Word, 8>(),
      extend_compressed_or_none<Word, 9>(),  extend_compressed_or_none<Word, 10>(),
      extend_compressed_or_none<Word, 11>(), extend_compressed_or_none<Word, 12>()};
  static_assert(kMaxRowsOfCompressed <= sizeof table / sizeof *table);
  return table[rows - 1];
}

// One block of compressed words for not many rows, in groups of nearly equal size: each decodes it.
template <class Word>
inline void extend_compressed_rows(const RowBlock& x, const CompressedWords& from,
                                   const PanelBlock& block, int64_t rows, float* tile) {
  const auto extend = [&](int64_t row, int64_t count, const PanelBlock& own) {
    const RowBlock group{x.words + row * x.stride, x.stride};
    extend_compressed_for<Word>(count)(group, from, own, tile + row * kPanel);
  };
  for_each_group(rows, kMaxRowsOfCompressed, block, extend);
}

// The product with compressed weights; the chains are those of linear<Word>. Up to kDecodedByEach
// rows decode each word where they multiply with it, more rows decode a block first.
template <class Word>
inline void linear_compressed(const LinearParams& p, int64_t number) {
  alignas(64) float tile[kCompressedTaskRows * kPanel], decoded[Units<Word>::kLargeBlock * kPanel];
  const LinearTask task = LinearTask::of(p, number);
  __builtin_memset(tile, 0, task.rows * kPanel * sizeof(float));
  auto from = CompressedWords::of(reinterpret_cast<const uint8_t*>(task.weights(p)));
  const Table table = Table::of(from.table);
  const int64_t most = task.block_words<Word>();
  for (int64_t w = 0; w < p.words; w += most) {
    const int64_t words = min(p.words - w, most), size = words * kCompressedWord;
    const RowBlock x = task.x<Word>(p, w);
    const auto* next = reinterpret_cast<const float*>(from.bytes + size);
    const PanelBlock block{decoded, words, next, size / int64_t(sizeof(float)) / kLine};
    if (task.rows <= kDecodedByEach) {
      extend_compressed_rows<Word>(x, from, block, task.rows, tile);
      from.skip(words);
    } else {
      for (int64_t i = 0; i < words; ++i) decode_word(from, table, decoded + i * kPanel);
      extend_many<Word>(x, block, task.rows, tile);
    }
  }
  task.write(p, tile);
}

}  // namespace cottention::COTTENTION_ISA
