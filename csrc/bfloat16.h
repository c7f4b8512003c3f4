// The 32-bit words that weights and rows of a product are made of: one channel in float32, or two
// neighbouring channels in bfloat16 (the first in the lower half); and the conversion to bfloat16.
// A word of weights is multiplied with kRowWords words of a row. Included by kernels.cpp only.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

struct Float32Word {
  static constexpr int kRowWords = 1;
  static Lanes part(Lanes weights, int) { return weights; }
  static Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
    return COTTENTION_ISA::multiply_add(a, b, c);
  }
};

struct BFloat16Pair {
  static constexpr int kRowWords = 1;
  static Lanes part(Lanes weights, int) { return weights; }
  static Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return multiply_add_pairs(a, b, c); }
};

// Weights in bfloat16 that stand for float32 of the same value; the row is float32. One multiply-add
// after the other, as with weights in float32.
struct WidenedPair {
  static constexpr int kRowWords = 2;
  static Lanes part(Lanes weights, int i) {
    return i == 0 ? first_halves(weights) : second_halves(weights);
  }
  static Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
    return COTTENTION_ISA::multiply_add(a, b, c);
  }
};

inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }

// Rounds to nearest, ties to even; NaN stays NaN.
inline uint32_t bfloat16_bits(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return x != x ? 0x7fc0 : rounded;
}

// Converts one row of x to words; an odd number of channels is padded with a zero.
inline void to_bfloat16(const ToBFloat16Params& p, int64_t row) {
  const float* x = p.x + row * p.x_stride;
  float* words = p.words + row * p.words_stride;
  int64_t c = 0;
#if defined(__AVX512BF16__)
  for (; c + 2 * kLanes <= p.channels; c += 2 * kLanes) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh(load(x + c + kLanes).all, load(x + c).all);
    store(words + c / 2, {(__m512)pairs});
  }
#endif
  for (; c < p.channels; c += 2) {
    const uint32_t second = c + 1 < p.channels ? bfloat16_bits(x[c + 1]) : 0;
    words[c / 2] = __builtin_bit_cast(float, bfloat16_bits(x[c]) | second << 16);
  }
}

}  // namespace cottention::COTTENTION_ISA
