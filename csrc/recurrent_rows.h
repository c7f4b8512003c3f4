// One token on a block of value rows: S ← S + v kᵀ, out = S q.
//
// Rows in the cache are updated side by side, rows from memory one after the other. The arithmetic
// is the same: one chain of sixteen lanes along the keys, reduced in one order. Included by
// kernels.cpp only.
#pragma once

#include "kernels.h"
#include "prefetch.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

#if defined(__AVX512F__)
constexpr int kRowGroup = 8;
#else
constexpr int kRowGroup = 4;
#endif

inline Quad finish_four(const Lanes* total) {
  return finish(fold(total[0]), fold(total[1]), fold(total[2]), fold(total[3]));
}

// Sixteen keys of one row: h += value × key, total += h × query.
inline Lanes advance_lanes(float* h, Lanes value, Lanes key, Lanes query, Lanes total) {
  const Lanes row = multiply_add(value, key, load(h));
  store(h, row);
  return multiply_add(row, query, total);
}

inline Lanes advance_half(float* h, Lanes value, const float* k, const float* q, Lanes total) {
  const Lanes row = multiply_add(value, load_half(k), load_half(h));
  store_half(h, row);
  return multiply_add(row, load_half(q), total);
}

// One token on kRowGroup value rows in the cache: updates h [kRowGroup, width] in place, total[r] =
// h_r · q in sixteen lanes. Each key is loaded once for all rows.
inline void advance_rows(float* h, const float* k, const float* q, const float* v, int64_t width,
                         Lanes* total) {
  Lanes value[kRowGroup];
#pragma GCC unroll 8
  for (int r = 0; r < kRowGroup; ++r) {
    total[r] = broadcast(0.0f);
    value[r] = broadcast(v[r]);
  }
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    const Lanes key = load(k + j), query = load(q + j);
#pragma GCC unroll 8
    for (int r = 0; r < kRowGroup; ++r)
      total[r] = advance_lanes(h + r * width + j, value[r], key, query, total[r]);
  }
  if (j == width) return;
#pragma GCC unroll 8
  for (int r = 0; r < kRowGroup; ++r)
    total[r] = advance_half(h + r * width + j, value[r], k + j, q + j, total[r]);
}

// The same on rows that are read from memory, in memory order.
inline void stream_rows(float* h, const float* k, const float* q, const float* v, int64_t width,
                        Lanes* total) {
  prefetch_pages(h, kRowGroup * width);
  for (int r = 0; r < kRowGroup; ++r, h += width) {
    const Lanes value = broadcast(v[r]);
    Lanes sum = broadcast(0.0f);
    int64_t j = 0;
    for (; j + kLanes <= width; j += kLanes)
      sum = advance_lanes(h + j, value, load(k + j), load(q + j), sum);
    total[r] = j < width ? advance_half(h + j, value, k + j, q + j, sum) : sum;
  }
}

// stream_rows for the common widths, with key and query in registers.
template <int kHeld>
inline void stream_held_rows(float* h, const Lanes* key, const Lanes* query, const float* v,
                             Lanes* total) {
  prefetch_pages(h, kRowGroup * kHeld * kLanes);
#pragma GCC unroll 8
  for (int r = 0; r < kRowGroup; ++r, h += kHeld * kLanes) {
    const Lanes value = broadcast(v[r]);
    total[r] = broadcast(0.0f);
#pragma GCC unroll 8
    for (int j = 0; j < kHeld; ++j)
      total[r] = advance_lanes(h + j * kLanes, value, key[j], query[j], total[r]);
  }
}

// The operands of one token on a block of rows; out is divided by `denominator` if there is one.
struct Token {
  const float *q, *k, *v;
  float* out;
  bool has_denominator;
  float denominator;
};

inline Token token_of(const RecurrentParams& p, int64_t token, int64_t head, int64_t row) {
  return {
      p.q.at(token, head),       p.k.at(token, head),
      p.v.at(token, head) + row, p.out_at(token, head) + row,
      p.denominators != nullptr, p.denominators ? p.denominators[token * p.heads + head] : 1.0f};
}

inline void write_outputs(const Token& t, int64_t row, const Lanes* total) {
#pragma GCC unroll 2
  for (int r = 0; r < kRowGroup; r += 4) {
    const Quad sums = finish_four(total + r);
    const Quad result =
        t.has_denominator ? sums / Quad{t.denominator, t.denominator, t.denominator, t.denominator}
                          : sums;
    __builtin_memcpy(t.out + row + r, &result, sizeof result);
  }
}

// One token on a block of rows from memory, its key and query in registers.
template <int kHeld>
inline void stream_held(const Token& t, float* h, int64_t rows) {
  Lanes key[kHeld], query[kHeld], total[kRowGroup];
#pragma GCC unroll 8
  for (int j = 0; j < kHeld; ++j) {
    key[j] = load(t.k + j * kLanes);
    query[j] = load(t.q + j * kLanes);
  }
  for (int64_t r = 0; r < rows; r += kRowGroup) {
    stream_held_rows<kHeld>(h + r * kHeld * kLanes, key, query, t.v + r, total);
    write_outputs(t, r, total);
  }
}

// One token on a block of rows [rows, width] from memory.
inline void stream_block(const Token& t, float* h, int64_t width, int64_t rows) {
  if (width == 4 * kLanes) return stream_held<4>(t, h, rows);
  if (width == 8 * kLanes) return stream_held<8>(t, h, rows);
  Lanes total[kRowGroup];
  for (int64_t r = 0; r < rows; r += kRowGroup) {
    stream_rows(h + r * width, t.k, t.q, t.v + r, width, total);
    write_outputs(t, r, total);
  }
}

// One token on a block of rows [rows, width] in the cache.
inline void advance_block(const Token& t, float* h, int64_t width, int64_t rows) {
  Lanes total[kRowGroup];
  for (int64_t r = 0; r < rows; r += kRowGroup) {
    advance_rows(h + r * width, t.k, t.q, t.v + r, width, total);
    write_outputs(t, r, total);
  }
}

}  // namespace cottention::COTTENTION_ISA
