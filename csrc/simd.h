// Vectors of sixteen floats: one AVX-512 register, two AVX2 registers or four of 128 bits.
//
// The lanes of a sum and the tree that reduces them are the same at every width, so AVX2 and
// AVX-512 give equal bits. The plain form rounds after the multiplication as well, because it
// cannot assume fused multiply-add. Included by kernels.cpp only, once per instruction set.
#pragma once

#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace cottention::COTTENTION_ISA {

typedef float Quad __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));

constexpr int64_t kLanes = 16;
constexpr int64_t kHalf = 8;

// Rows and vectors of 16 columns whose sums of a product stay in registers. Up to kFewRows rows,
// weights are read in the order of addresses, which the hardware prefetches best.
// Up to kSmallBlockRows rows, a block of a panel is small: on Zen 4 eight rows are then 5 % faster
// with AVX-512, but 9 % slower with AVX2, which reads a block several times; many rows are slower.
// Up to kDecodedByEach rows, in groups of kMaxRowsOfCompressed, decode compressed weights in
// registers.
#if defined(__AVX512F__)
constexpr int kMaxRows = 6, kMaxRowsOfPairs = 6;
constexpr int across(int) { return 4; }
constexpr int kMaxRowsOfCompressed = 12;
constexpr int64_t kDecodedByEach = 36;
constexpr int across_compressed(int rows) { return rows <= 4 ? 4 : 2; }
constexpr int64_t kFewRows = 4;
constexpr int64_t kSmallBlockRows = 16;
#elif defined(__AVX2__)
constexpr int kMaxRows = 6, kMaxRowsOfPairs = 5;
constexpr int across(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
constexpr int kMaxRowsOfCompressed = 4;
constexpr int64_t kDecodedByEach = 4;
constexpr int across_compressed(int rows) { return across(rows); }
constexpr int64_t kFewRows = 1;
constexpr int64_t kSmallBlockRows = 1;
#else
constexpr int kMaxRows = 2, kMaxRowsOfPairs = 2;
constexpr int across(int rows) { return rows == 1 ? 2 : 1; }
constexpr int kMaxRowsOfCompressed = 1;
constexpr int64_t kDecodedByEach = 1;
constexpr int across_compressed(int) { return 1; }
constexpr int64_t kFewRows = 1;
constexpr int64_t kSmallBlockRows = 1;
#endif

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

#if defined(__AVX512F__)

struct Lanes {
  __m512 all;
};
typedef __m512 Part;
inline Lanes broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Lanes load_half(const float* p) { return {_mm512_maskz_loadu_ps(0xff, p)}; }
inline void store(float* p, Lanes x) { _mm512_storeu_ps(p, x.all); }
inline void store_half(float* p, Lanes x) { _mm512_mask_storeu_ps(p, 0xff, x.all); }
inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.all, b.all)}; }
inline Lanes multiply(Lanes a, Lanes b) { return {_mm512_mul_ps(a.all, b.all)}; }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
  return {_mm512_fmadd_ps(a.all, b.all, c.all)};
}
inline Part multiply_add(Part a, Part b, Part c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes first_halves(Lanes x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.all), 16))};
}
inline Lanes second_halves(Lanes x) {
  const __m512i mask = _mm512_set1_epi32(~0xffff);
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x.all), mask))};
}
inline Quad fold(Lanes x) {
  const __m256 high = _mm512_extractf32x8_ps(x.all, 1);
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.all), high);
  return (Quad)_mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}

#elif defined(__AVX2__)

struct Lanes {
  __m256 low, high;
};
typedef __m256 Part;
inline Lanes broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Lanes load_half(const float* p) { return {_mm256_loadu_ps(p), _mm256_setzero_ps()}; }
inline void store(float* p, Lanes x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}
inline void store_half(float* p, Lanes x) { _mm256_storeu_ps(p, x.low); }
inline Lanes add(Lanes a, Lanes b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline Lanes multiply(Lanes a, Lanes b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Part multiply_add(Part a, Part b, Part c) { return _mm256_fmadd_ps(a, b, c); }
inline __m256 first_halves(__m256 x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16));
}
inline __m256 second_halves(__m256 x) {
  return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(~0xffff)));
}
inline Lanes first_halves(Lanes x) { return {first_halves(x.low), first_halves(x.high)}; }
inline Lanes second_halves(Lanes x) { return {second_halves(x.low), second_halves(x.high)}; }
inline Quad fold(Lanes x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  return (Quad)_mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}

#else

struct Lanes {
  Quad part[4];
};
typedef Quad Part;
inline Quad load_quad(const float* p) {
  Quad x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline void store_quad(float* p, Quad x) { __builtin_memcpy(p, &x, sizeof x); }
inline Lanes broadcast(float x) {
  const Quad all = {x, x, x, x};
  return {{all, all, all, all}};
}
inline Lanes load(const float* p) {
  return {{load_quad(p), load_quad(p + 4), load_quad(p + 8), load_quad(p + 12)}};
}
inline Lanes load_half(const float* p) {
  return {{load_quad(p), load_quad(p + 4), Quad{}, Quad{}}};
}
inline void store_half(float* p, Lanes x) {
  store_quad(p, x.part[0]);
  store_quad(p + 4, x.part[1]);
}
inline void store(float* p, Lanes x) {
  store_half(p, x);
  store_quad(p + 8, x.part[2]);
  store_quad(p + 12, x.part[3]);
}
inline Lanes add(Lanes a, Lanes b) {
  return {
      {a.part[0] + b.part[0], a.part[1] + b.part[1], a.part[2] + b.part[2], a.part[3] + b.part[3]}};
}
inline Lanes multiply(Lanes a, Lanes b) {
  return {
      {a.part[0] * b.part[0], a.part[1] * b.part[1], a.part[2] * b.part[2], a.part[3] * b.part[3]}};
}
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
  return {{a.part[0] * b.part[0] + c.part[0], a.part[1] * b.part[1] + c.part[1],
           a.part[2] * b.part[2] + c.part[2], a.part[3] * b.part[3] + c.part[3]}};
}
inline Part multiply_add(Part a, Part b, Part c) { return a * b + c; }
inline Quad first_halves(Quad x) { return (Quad)((Words)x << 16); }
inline Quad second_halves(Quad x) { return (Quad)((Words)x & ~0xffffu); }
inline Lanes first_halves(Lanes x) {
  return {{first_halves(x.part[0]), first_halves(x.part[1]), first_halves(x.part[2]),
           first_halves(x.part[3])}};
}
inline Lanes second_halves(Lanes x) {
  return {{second_halves(x.part[0]), second_halves(x.part[1]), second_halves(x.part[2]),
           second_halves(x.part[3])}};
}
inline Quad fold(Lanes x) { return (x.part[0] + x.part[2]) + (x.part[1] + x.part[3]); }

#endif

// A register of Lanes. Loops that need many at a time go through Lanes part by part, so that the
// sixteen registers of AVX2 are enough.
constexpr int kParts = sizeof(Lanes) / sizeof(Part);
constexpr int64_t kPartLanes = kLanes / kParts;

inline Part load_part(const float* p) {
  Part x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline void store_part(float* p, Part x) { __builtin_memcpy(p, &x, sizeof x); }
inline Part broadcast_part(float x) { return x - Part{}; }

#if defined(__AVX2__)
// Of x the compiler knows no more than the register. GCC 12 else copies sums of whole numbers from
// one to another, or to memory, and loads weights again for each row.
template <class Register>
inline void hold(Register& x) {
  asm("" : "+v"(x));
}
#endif
// Of memory the compiler knows no more. GCC 12 else keeps stored values for a later load, and stores
// them twice where registers are missing.
inline void forget_memory() { asm volatile("" ::: "memory"); }

// The last reduction of four folded sums, side by side: each is (x0 + x2) + (x1 + x3).
inline Quad finish(Quad a, Quad b, Quad c, Quad d) {
  const Quad ab =
      __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Quad cd =
      __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

inline float sum(Lanes x) {
  const Quad four = fold(x);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

}  // namespace cottention::COTTENTION_ISA
