// The 32-bit words that weights of a product are made of: one channel in float32, or two
// neighbouring channels in bfloat16 (the first in the lower half); and the rows that they are
// multiplied with. A word of weights is multiplied with kRowWords words of a row, part by part in
// this order; `place` says which of them belongs to a part. Included by kernels.cpp only.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

struct Float32Word {
  using Sum = Lanes;
  static constexpr int kRowWords = 1;
  static constexpr int kMaxRows = COTTENTION_ISA::kMaxRows;
  static int place(int) { return 0; }
  static Lanes part(Lanes weights, int) { return weights; }
  static Lanes multiply_add(Lanes a, float b, Lanes c) {
    return COTTENTION_ISA::multiply_add(a, broadcast(b), c);
  }
};

// Weights in bfloat16 that stand for float32 of the same value; the row is float32. One multiply-add
// after the other, as with weights in float32.
struct WidenedPair : Float32Word {
  static constexpr int kRowWords = 2;
  static constexpr int kMaxRows = kMaxRowsOfPairs;
  static int place(int i) { return i; }
  static Lanes part(Lanes weights, int i) {
    return i == 0 ? first_halves(weights) : second_halves(weights);
  }
};

#if defined(__AVX512BF16__)
// Weights and rows in bfloat16, two channels with one instruction: the second is added first.
struct BFloat16Pair : Float32Word {
  static Lanes multiply_add(Lanes a, float b, Lanes c) {
    return {_mm512_dpbf16_ps(c.all, (__m512bh)a.all, (__m512bh)broadcast(b).all)};
  }
};
#else
// In the order of the instruction, where there is none. Rows are rounded to bfloat16 and kept in
// float32, so that in the product the weights alone are widened, once for all rows.
struct BFloat16Pair : WidenedPair {
  static int place(int i) { return 1 - i; }
  static Lanes part(Lanes weights, int i) {
    return i == 0 ? second_halves(weights) : first_halves(weights);
  }
};
#endif

inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }

// Rounds to nearest, ties to even; NaN stays NaN.
inline uint32_t bfloat16_bits(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return x != x ? 0x7fc0 : rounded;
}

// Rounds one row of x; an odd number of channels is padded with a zero.
inline void to_bfloat16(const ConvertRowParams& p, int64_t row) {
  const float* x = p.x + row * p.x_stride;
  float* words = p.words + row * p.words_stride;
  int64_t c = 0;
#if defined(__AVX512BF16__)
  for (; c + 2 * kLanes <= p.channels; c += 2 * kLanes) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh(load(x + c + kLanes).all, load(x + c).all);
    store(words + c / 2, {(__m512)pairs});
  }
  for (; c < p.channels; c += 2) {
    const uint32_t second = c + 1 < p.channels ? bfloat16_bits(x[c + 1]) : 0;
    words[c / 2] = __builtin_bit_cast(float, bfloat16_bits(x[c]) | second << 16);
  }
#else
  for (; c < p.channels; ++c) words[c] = __builtin_bit_cast(float, bfloat16_bits(x[c]) << 16);
  if (c % 2) words[c] = 0;
#endif
}

}  // namespace cottention::COTTENTION_ISA
