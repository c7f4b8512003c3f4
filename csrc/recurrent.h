// The recurrence on value rows: state += v ⊗ k, out = state q, token after token.
//
// A block of value rows stays in the first cache while a chunk of tokens runs through it, and a
// head's rows in the second while the segment does, so prefill moves the state once. A token's
// arithmetic is the same in prefill and in decode: one chain of sixteen lanes along the keys,
// folded in one order. Included by kernels.cpp only.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

#if defined(__AVX512F__)
constexpr int kRowGroup = 8;
#else
constexpr int kRowGroup = 4;
#endif

constexpr int64_t kFetchAhead = 2048;     // elements of state
constexpr int64_t kTokensAhead = 2;
constexpr int64_t kTokenChunk = 32;       // its keys and queries stay in the second cache
constexpr int64_t kBlockElements = 4096;  // 16 KB of state: half of a small first cache

// One token on kRowGroup value rows: h [kRowGroup, width] in place, sums[r] = h_r · q. At a
// segment's first token the rows come from memory, and those ahead are asked for in their order.
template <bool kIsFirst>
inline void advance_rows(float* h, const float* k, const float* q, const float* v, int64_t width,
                         Quad* sums) {
  Lanes total[kRowGroup], value[kRowGroup];
#pragma GCC unroll 8
  for (int r = 0; r < kRowGroup; ++r) {
    total[r] = broadcast(0.0f);
    value[r] = broadcast(v[r]);
  }
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    const Lanes key = load(k + j), query = load(q + j);
#pragma GCC unroll 8
    for (int r = 0; r < kRowGroup; ++r) {
      if (kIsFirst) __builtin_prefetch(h + kFetchAhead + j * kRowGroup + r * kLanes, 1);
      const Lanes row = multiply_add(value[r], key, load(h + r * width + j));
      store(h + r * width + j, row);
      total[r] = multiply_add(row, query, total[r]);
    }
  }
  if (j < width) {
    const Lanes key = load_half(k + j), query = load_half(q + j);
#pragma GCC unroll 8
    for (int r = 0; r < kRowGroup; ++r) {
      const Lanes row = multiply_add(value[r], key, load_half(h + r * width + j));
      store_half(h + r * width + j, row);
      total[r] = multiply_add(row, query, total[r]);
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < kRowGroup; r += 4)
    sums[r / 4] =
        finish(fold(total[r]), fold(total[r + 1]), fold(total[r + 2]), fold(total[r + 3]));
}

inline void zero_outputs(const RecurrentParams& p, int64_t segment, int64_t head, int64_t row,
                         int64_t rows) {
  for (int64_t t = p.first(segment); t < p.first(segment + 1); ++t)
    __builtin_memset(p.out_at(t, head) + row, 0, rows * sizeof(float));
}

// One token on a block of rows; out is divided by the token's denominator where there is one.
template <bool kIsFirst>
inline void advance_block(const RecurrentParams& p, float* h, int64_t token, int64_t head,
                          int64_t row, int64_t rows) {
  const float* q = p.q.at(token, head);
  const float* k = p.k.at(token, head);
  const float* v = p.v.at(token, head) + row;
  float* out = p.out_at(token, head) + row;
  const float below = p.denominators ? p.denominators[token * p.heads + head] : 1.0f;
  for (int64_t r = 0; r < rows; r += kRowGroup) {
    Quad sums[kRowGroup / 4];
    advance_rows<kIsFirst>(h + r * p.key_width, k, q, v + r, p.key_width, sums);
#pragma GCC unroll 2
    for (int i = 0; i < kRowGroup / 4; ++i) {
      const Quad result = p.denominators ? sums[i] / Quad{below, below, below, below} : sums[i];
      __builtin_memcpy(out + r + 4 * i, &result, sizeof result);
    }
  }
}

// A head's tokens lie too far apart for the machine to foresee; above all its stores to `out`,
// which retire in order, would hold up those to the state.
inline void fetch_token(const RecurrentParams& p, int64_t token, int64_t head, int64_t row,
                        int64_t rows) {
  for (int64_t j = 0; j < p.key_width; j += kLanes) {
    __builtin_prefetch(p.q.at(token, head) + j);
    __builtin_prefetch(p.k.at(token, head) + j);
  }
  for (int64_t r = row; r < row + rows; r += kLanes) {
    __builtin_prefetch(p.v.at(token, head) + r);
    __builtin_prefetch(p.out_at(token, head) + r, 1);
  }
}

// Tokens [first, last) on a block of rows.
inline void advance_tokens(const RecurrentParams& p, float* h, int64_t first, int64_t last,
                           bool is_start, int64_t head, int64_t row, int64_t rows) {
  for (int64_t t = first; t < last; ++t) {
    if (t + kTokensAhead < last) fetch_token(p, t + kTokensAhead, head, row, rows);
    if (is_start && t == first)
      advance_block<true>(p, h, t, head, row, rows);
    else
      advance_block<false>(p, h, t, head, row, rows);
  }
}

// The part of one head of one segment that a task works on: tokens [first, last) on value rows
// [begin, end).
struct Share {
  int64_t segment, head, first, last, begin, end;
};

inline Share share_of(const RecurrentParams& p, int64_t task) {
  const int64_t begin = task % p.shares() * p.share_rows;
  const int64_t head = task / p.shares() % p.heads;
  const int64_t segment = task / p.shares() / p.heads;
  const int64_t end = least(begin + p.share_rows, p.value_width);
  return {segment, head, p.first(segment), p.first(segment + 1), begin, end};
}

// Tokens [t, stop) of a share, at most kTokenChunk of them.
inline void advance_chunk(const RecurrentParams& p, const Share& s, int64_t t, int64_t stop) {
  float* h = p.state + p.slots[s.segment] * p.state_stride + s.head * p.value_width * p.key_width;
  const int64_t fitting = kBlockElements / p.key_width / kRowGroup * kRowGroup;
  for (int64_t row = s.begin; row < s.end; row += fitting)
    advance_tokens(p, h + row * p.key_width, t, stop, t == s.first, s.head, row,
                   least(fitting, s.end - row));
}

inline void recurrent(const RecurrentParams& p, int64_t task) {
  const Share s = share_of(p, task);
  if (p.slots[s.segment] == kPaddingSlot)
    return zero_outputs(p, s.segment, s.head, s.begin, s.end - s.begin);
  for (int64_t t = s.first; t < s.last; t += kTokenChunk)
    advance_chunk(p, s, t, least(t + kTokenChunk, s.last));
}

// z += k along a segment; denominators[t] = max(z · q, floor).
inline void denominators(const RecurrentParams& p, int64_t task) {
  const int64_t head = task % p.heads, segment = task / p.heads;
  const int32_t slot = p.slots[segment];
  if (slot == kPaddingSlot) return;
  float* z = p.z + slot * p.z_stride + head * p.key_width;
  for (int64_t t = p.first(segment); t < p.first(segment + 1); ++t) {
    const float* q = p.q.at(t, head);
    const float* k = p.k.at(t, head);
    Lanes total = broadcast(0.0f);
    int64_t j = 0;
    for (; j + kLanes <= p.key_width; j += kLanes) {
      const Lanes row = add(load(z + j), load(k + j));
      store(z + j, row);
      total = multiply_add(row, load(q + j), total);
    }
    if (j < p.key_width) {
      const Lanes row = add(load_half(z + j), load_half(k + j));
      store_half(z + j, row);
      total = multiply_add(row, load_half(q + j), total);
    }
    const float value = sum(total);
    p.denominators[t * p.heads + head] = value < kDenominatorFloor ? kDenominatorFloor : value;
  }
}

}  // namespace cottention::COTTENTION_ISA
