// Weights of eight bits, and rows of eight bits to multiply them with.
//
// Both are whole numbers from -127 to 127 with a scale for each group of kGroup channels: of each
// output column, or of the row. Sums within a group are exact whole numbers, so that neither their
// order nor the instruction matters; groups are added one after the other, each with one
// multiply-add in float32.
//
// A group of a panel is kGroupWords rows of kPanel words: the scales, then the channels, four to a
// word. Weights are stored with 128 added, as unsigned bytes; the sums of a group start at -128
// times the sum of the row's group. Included by kernels.cpp only.
#pragma once

#include "bfloat16.h"
#include "kernels.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

constexpr int kOffset = 128;
constexpr float kLargest = 127;

// `Weights` are those of a word and 16 columns, `values` a row's of the same channels.

#if defined(__AVX512VNNI__)

// Four products of unsigned and signed bytes in each lane.
struct Quantized {
  struct Sum {
    __m512i all;
  };
  using Weights = __m512i;
  static constexpr int kRowWords = 1;
  static constexpr int kMaxRows = 6;
  static Sum start(uint32_t word) { return {_mm512_set1_epi32(word)}; }
  static Lanes to_float(Sum x) { return {_mm512_cvtepi32_ps(x.all)}; }
  static Weights weights(const float* word) {
    __m512i x = _mm512_loadu_si512(word);
    hold(x);
    return x;
  }
  static void add_word(const Weights& weights, const float* values, Sum& sum) {
    const __m512i four = _mm512_castps_si512(_mm512_set1_ps(*values));
    sum.all = _mm512_dpbusd_epi32(sum.all, weights, four);
    hold(sum.all);
  }
};

#elif defined(__AVX2__)

// Two products of 16 bits in each lane: the even channels of a word, then the odd ones.
struct Quantized {
  static constexpr int kRowWords = 2;
#if defined(__AVX512F__)
  struct Sum {
    __m512i all;
  };
  struct Weights {
    __m512i even, odd;
  };
  static constexpr int kMaxRows = 5;
  static Sum start(uint32_t word) { return {_mm512_set1_epi32(word)}; }
  static Lanes to_float(Sum x) { return {_mm512_cvtepi32_ps(x.all)}; }
  static Weights weights(const float* word) {
    __m512i x = _mm512_loadu_si512(word);
    hold(x);
    return {_mm512_and_si512(x, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(x, 8)};
  }
  static __m512i products(__m512i weights, float values) {
    return _mm512_madd_epi16(weights, _mm512_castps_si512(_mm512_set1_ps(values)));
  }
  static void add_word(const Weights& weights, const float* values, Sum& sum) {
    const __m512i four = _mm512_add_epi32(products(weights.even, values[0]),
                                          products(weights.odd, values[1]));
    sum.all = _mm512_add_epi32(sum.all, four);
    hold(sum.all);
  }
#else
  struct Sum {
    __m256i low, high;
  };
  struct Half {
    __m256i even, odd;
  };
  struct Weights {
    Half low, high;
  };
  static constexpr int kMaxRows = 4;
  static Sum start(uint32_t word) { return {_mm256_set1_epi32(word), _mm256_set1_epi32(word)}; }
  static Lanes to_float(Sum x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
  static Half half(const float* word) {
    __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(word));
    hold(x);
    return {_mm256_and_si256(x, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(x, 8)};
  }
  static Weights weights(const float* word) { return {half(word), half(word + kHalf)}; }
  static void add_half(const Half& weights, __m256i even, __m256i odd, __m256i& sum) {
    const __m256i four = _mm256_add_epi32(_mm256_madd_epi16(weights.even, even),
                                          _mm256_madd_epi16(weights.odd, odd));
    sum = _mm256_add_epi32(sum, four);
    hold(sum);
  }
  static void add_word(const Weights& weights, const float* values, Sum& sum) {
    const __m256i even = _mm256_castps_si256(_mm256_set1_ps(values[0]));
    const __m256i odd = _mm256_castps_si256(_mm256_set1_ps(values[1]));
    add_half(weights.low, even, odd, sum.low);
    add_half(weights.high, even, odd, sum.high);
  }
#endif
};

#else

// In float32, which has all sums of a group exactly: one channel of a word after the other.
struct Quantized {
  using Sum = Lanes;
  using Weights = Lanes;
  static constexpr int kRowWords = 4;
  static constexpr int kMaxRows = COTTENTION_ISA::kMaxRows;
  static Sum start(uint32_t word) { return broadcast(float(int32_t(word))); }
  static Lanes to_float(Sum x) { return x; }
  static Weights weights(const float* word) { return load(word); }
  static Quad channel(Quad weights, int i) {
    typedef int32_t Ints __attribute__((vector_size(16)));
    return __builtin_convertvector((Ints)((Words)weights >> (8 * i) & 0xffu), Quad);
  }
  static void add_word(const Weights& weights, const float* values, Sum& sum) {
    for (int i = 0; i < kRowWords; ++i)
      for (int part = 0; part < kParts; ++part) {
        const Quad value = broadcast_part(values[i]);
        sum.part[part] = multiply_add(channel(weights.part[part], i), value, sum.part[part]);
      }
  }
};

#endif

struct EightBits : Quantized {
  static constexpr int64_t kGroupValues = kGroup / 4 * kRowWords;  // words of a row's group
  static constexpr int64_t kScaleAt = kGroupValues, kStartAt = kGroupValues + 1;
  static constexpr int64_t kRowGroup = kGroupValues + 2;
};

// A whole number near 0 from its float: the sum's lower bits, rounded to nearest, ties to even.
constexpr float kRounder = 12582912;  // 1.5 · 2^23
inline int32_t rounded(float x) {
  return int32_t(bits_of(x + kRounder)) - int32_t(bits_of(kRounder));
}

// The largest magnitude of a group as the bits of a float, which order as floats do; NaN is largest.
inline float largest(const float* x, int64_t count) {
  uint32_t most = 0;
  for (int64_t c = 0; c < count; ++c) {
    const uint32_t magnitude = bits_of(x[c]) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  return __builtin_bit_cast(float, most);
}

constexpr float kLeast = 1e-30f;  // what is smaller is 0: its reciprocal might be infinite

// Writes the whole numbers [kGroup] of `count` channels, padded with zeros, and returns their scale.
inline float quantize(const float* x, int64_t count, int32_t* out) {
  const float most = largest(x, count);
  const float inverse = most < kLeast ? 0 : kLargest / most;
  for (int64_t c = 0; c < count; ++c) out[c] = rounded(x[c] * inverse);
  for (int64_t c = count; c < kGroup; ++c) out[c] = 0;
  return most < kLeast ? 0 : most / kLargest;
}

// One group of a row, as the words that EightBits takes.
inline void write_group(const int32_t* x, float scale, float* words) {
  auto* to = reinterpret_cast<uint32_t*>(words);
  int32_t total = 0;
  for (int64_t c = 0; c < kGroup; ++c) total += x[c];
  for (int64_t w = 0; w < kGroup / 4; ++w) {
    const int32_t* four = x + 4 * w;
#if defined(__AVX512VNNI__)
    to[w] = uint32_t(four[0] & 0xff) | uint32_t(four[1] & 0xff) << 8 |
            uint32_t(four[2] & 0xff) << 16 | uint32_t(four[3] & 0xff) << 24;
#elif defined(__AVX2__)
    to[2 * w] = uint32_t(four[0] & 0xffff) | uint32_t(four[2]) << 16;
    to[2 * w + 1] = uint32_t(four[1] & 0xffff) | uint32_t(four[3]) << 16;
#else
    for (int64_t i = 0; i < 4; ++i) words[4 * w + i] = float(four[i]);
#endif
  }
  words[EightBits::kScaleAt] = scale;
  to[EightBits::kStartAt] = uint32_t(-kOffset * total);
}

// Quantizes one row of x.
inline void to_int8(const ConvertRowParams& p, int64_t row) {
  const float* x = p.x + row * p.x_stride;
  float* words = p.words + row * p.words_stride;
  for (int64_t c = 0; c < p.channels; c += kGroup, words += EightBits::kRowGroup) {
    alignas(64) int32_t whole[kGroup];
    const float scale = quantize(x + c, min(p.channels - c, kGroup), whole);
    write_group(whole, scale, words);
  }
}

// Quantizes one panel of a weight [columns, channels] into [groups, kGroupWords, kPanel] words.
inline void quantize_panel(const QuantizeParams& p, int64_t panel) {
  const int64_t groups = (p.channels + kGroup - 1) / kGroup;
  float* to = p.packed + panel * groups * kGroupWords * kPanel;
  for (int64_t g = 0; g < groups; ++g, to += kGroupWords * kPanel)
    for (int64_t j = 0; j < kPanel; ++j) {
      const int64_t column = panel * kPanel + j, first = g * kGroup;
      int32_t whole[kGroup] = {};
      to[j] = column < p.columns ? quantize(p.weight + column * p.stride + first,
                                            min(p.channels - first, kGroup), whole)
                                 : 0;
      auto* bytes = reinterpret_cast<uint8_t*>(to + kPanel + j);
      for (int64_t c = 0; c < kGroup; ++c)
        bytes[c / 4 * kPanel * 4 + c % 4] = uint8_t(whole[c] + kOffset);
    }
}

}  // namespace cottention::COTTENTION_ISA
