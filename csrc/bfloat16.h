// The words of 32 bits that a product's weights and rows are made of: one channel in float32, or
// two neighbouring channels in bfloat16, the first in the lower half.
//
// Owns how rows of float32 become words. Included by kernels.cpp only.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

struct FloatWord {
  static Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
    return COTTENTION_ISA::multiply_add(a, b, c);
  }
};

struct PairWord {
  static Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return multiply_add_pairs(a, b, c); }
};

inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }

// To the nearest, ties to even; what is not a number stays none.
inline uint32_t bfloat16_bits(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return x != x ? 0x7fc0 : rounded;
}

// One row of x → words, a zero behind an odd end.
inline void round_row(const RoundParams& p, int64_t row) {
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
