// Weights in bfloat16 in twelve bits each, without loss: the upper byte, which is the sign and most
// of the exponent, has few values in a panel, and is kept as a code of four bits.
//
// A panel is a header, its exceptions, and kCompressedWord bytes for each word of channels: the
// lower bytes of the weights of columns 0 to 31, those of 32 to 63, and the codes of both in the
// lower and upper halves of kHalfPanel bytes. Of 16 lower bytes, the first eight belong to as many
// weights of the first 16 columns and the others to those of the next 16, so that interleaving them
// with upper bytes gives words of neighbouring channels (bfloat16.h). Weights whose upper byte has
// no code are exceptions. Included by kernels.cpp only.
#pragma once

#include "bfloat16.h"
#include "kernels.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

// Words of a panel from some word on; they are read once, in order.
struct CompressedWords {
  const uint8_t* table;  // [16], the upper byte of each code
  const uint8_t* bytes;
  const CompressedException* exception;  // the next one
  uint32_t word = 0;

  static CompressedWords of(const uint8_t* panel) {
    const auto* header = reinterpret_cast<const CompressedHeader*>(panel);
    const uint8_t* exceptions = panel + sizeof(CompressedHeader);
    return {header->table, exceptions + header->capacity * sizeof(CompressedException),
            reinterpret_cast<const CompressedException*>(exceptions)};
  }
  bool is_exceptional() const { return exception->word == word; }
  void next() {
    bytes += kCompressedWord;
    ++word;
  }
  void skip(int64_t words) {
    bytes += words * kCompressedWord;
    word += uint32_t(words);
    while (exception->word < word) ++exception;
  }
};

#if defined(__AVX512F__)

struct Table {
  __m512i all;
  static Table of(const uint8_t* table) {
    return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)))};
  }
};

// The words of 32 columns.
inline void decode_half(const uint8_t* bytes, int half, const Table& table, Lanes* out) {
  const __m512i lower = _mm512_loadu_si512(bytes + half * kHalfPanel);
  __m512i codes = _mm512_loadu_si512(bytes + 2 * kHalfPanel);
  if (half == 1) codes = _mm512_srli_epi16(codes, 4);
  codes = _mm512_and_si512(codes, _mm512_set1_epi8(15));
  const __m512i upper = _mm512_shuffle_epi8(table.all, codes);
  out[0] = {_mm512_castsi512_ps(_mm512_unpacklo_epi8(lower, upper))};
  out[1] = {_mm512_castsi512_ps(_mm512_unpackhi_epi8(lower, upper))};
}

#elif defined(__AVX2__)

struct Table {
  __m256i all;
  static Table of(const uint8_t* table) {
    return {_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)))};
  }
};

inline void decode_quarter(const uint8_t* bytes, int half, const Table& table, __m256& first,
                           __m256& second) {
  const __m256i lower =
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + half * kHalfPanel));
  __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 2 * kHalfPanel));
  if (half == 1) codes = _mm256_srli_epi16(codes, 4);
  codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
  const __m256i upper = _mm256_shuffle_epi8(table.all, codes);
  first = _mm256_castsi256_ps(_mm256_unpacklo_epi8(lower, upper));
  second = _mm256_castsi256_ps(_mm256_unpackhi_epi8(lower, upper));
}

inline void decode_half(const uint8_t* bytes, int half, const Table& table, Lanes* out) {
  decode_quarter(bytes, half, table, out[0].low, out[1].low);
  decode_quarter(bytes + kHalfPanel / 2, half, table, out[0].high, out[1].high);
}

#else

struct Table {
  const uint8_t* all;
  static Table of(const uint8_t* table) { return {table}; }
};

inline void decode_half(const uint8_t* bytes, int half, const Table& table, Lanes* out) {
  uint16_t values[2][2 * kLanes];
  for (int64_t i = 0; i < kHalfPanel; ++i) {
    const int code = bytes[2 * kHalfPanel + i] >> 4 * half & 15;
    const int value = table.all[code] << 8 | bytes[half * kHalfPanel + i];
    values[i / 8 % 2][i / 16 * 8 + i % 8] = uint16_t(value);
  }
  __builtin_memcpy(static_cast<void*>(out), values, sizeof values);
}

#endif

// The words of one or two times 16 columns, the strip of that number.
template <int A>
inline void decode(const uint8_t* bytes, int strip, const Table& table, Lanes* out) {
  if constexpr (A == 2) return decode_half(bytes, strip, table, out);
  Lanes both[2];
  decode_half(bytes, strip / 2, table, both);
  *out = both[strip % 2];
}

// Writes the words of all columns of the next word of channels.
inline void decode_word(CompressedWords& from, const Table& table, float* to) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    Lanes words[2];
    decode_half(from.bytes, half, table, words);
    store(to + half * 2 * kLanes, words[0]);
    store(to + half * 2 * kLanes + kLanes, words[1]);
  }
  for (; from.is_exceptional(); ++from.exception)
    __builtin_memcpy(reinterpret_cast<uint16_t*>(to) + from.exception->place,
                     &from.exception->value, sizeof(uint16_t));
  from.next();
}

}  // namespace cottention::COTTENTION_ISA
