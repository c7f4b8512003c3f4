// The words of 32 bits that a product's weights and rows are made of: one channel in float32, or
// two neighbouring channels in bfloat16, the first in the lower half.
//
// Owns how rows of float32 become words. Included by kernels.cpp only.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

// Rows of words, `stride` words apart.
struct RowBlock {
  const float* words;
  int64_t stride;
};

struct FloatWord {
  static constexpr int64_t kChannels = 1;
  static constexpr int64_t kBlock = 128;  // words of a panel that fit into the first cache
  struct Buffer {};

  static Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
    return COTTENTION_ISA::multiply_add(a, b, c);
  }
  static RowBlock rows(const LinearParams& p, int64_t first, int64_t, int64_t word, Buffer&) {
    return {p.x + first * p.x_stride + word, p.x_stride};
  }
};

inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }

// To the nearest, ties to even; what is not a number stays none.
inline uint32_t bfloat16_bits(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return x != x ? 0x7fc0 : rounded;
}

// x [channels] → words, a zero behind an odd end.
inline void round_to_pairs(const float* x, int64_t channels, float* words) {
  int64_t c = 0;
#if defined(__AVX512BF16__)
  for (; c + 2 * kLanes <= channels; c += 2 * kLanes) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh(load(x + c + kLanes).all, load(x + c).all);
    store(words + c / 2, {(__m512)pairs});
  }
#endif
  for (; c < channels; c += 2) {
    const uint32_t second = c + 1 < channels ? bfloat16_bits(x[c + 1]) : 0;
    words[c / 2] = __builtin_bit_cast(float, bfloat16_bits(x[c]) | second << 16);
  }
}

struct PairWord {
  static constexpr int64_t kChannels = 2;
  static constexpr int64_t kBlock = 128;
  struct Buffer {
    alignas(64) float words[kTaskRows * kBlock];
  };

  static Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return multiply_add_pairs(a, b, c); }
  static RowBlock rows(const LinearParams& p, int64_t first, int64_t count, int64_t word,
                       Buffer& buffer) {
    const int64_t channels = least(p.channels - 2 * word, 2 * kBlock);
    for (int64_t r = 0; r < count; ++r)
      round_to_pairs(p.x + (first + r) * p.x_stride + 2 * word, channels,
                     buffer.words + r * kBlock);
    return {buffer.words, kBlock};
  }
};

}  // namespace cottention::COTTENTION_ISA
