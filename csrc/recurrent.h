// The recurrence on value rows: state += v ⊗ k, out = state q, token after token.
//
// A block of value rows stays in the first cache while a chunk of tokens runs through it, and a
// head's rows in the second while the segment does, so prefill moves the state once. A token's
// arithmetic (rows.h) is the same in prefill and in decode. Included by kernels.cpp only.
#pragma once

#include "kernels.h"
#include "recurrent_rows.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

constexpr int64_t kTokensAhead = 2;
constexpr int64_t kTokenChunk = 32;       // its keys and queries stay in the second cache
constexpr int64_t kBlockElements = 4096;  // 16 KB of state: half of a small first cache

inline void zero_outputs(const RecurrentParams& p, int64_t segment, int64_t head, int64_t row,
                         int64_t rows) {
  for (int64_t t = p.first(segment); t < p.first(segment + 1); ++t)
    __builtin_memset(p.out_at(t, head) + row, 0, rows * sizeof(float));
}

// A token's rows lie too far apart for the machine to foresee; above all its stores to `out`, which
// retire in order, would hold up those to the state.
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
    const Token token = token_of(p, t, head, row);
    if (is_start && t == first)
      stream_block(token, h, p.key_width, rows);
    else
      advance_block(token, h, p.key_width, rows);
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

inline float* head_state(const RecurrentParams& p, int64_t segment, int64_t head) {
  return p.state + p.slots[segment] * p.state_stride + head * p.value_width * p.key_width;
}

// The next task's state, where that lies in another slot: fetch_pages has gone on in this one.
inline void fetch_next_slot(const RecurrentParams& p, const Share& now, const Share& next) {
  if (next.segment == now.segment || p.slots[next.segment] == kPaddingSlot) return;
  const float* h = head_state(p, next.segment, next.head);
  __builtin_prefetch(h);
  __builtin_prefetch(h + kPage / sizeof(float));
}

// Tokens [t, stop) of a share, at most kTokenChunk of them.
inline void advance_chunk(const RecurrentParams& p, const Share& s, int64_t t, int64_t stop) {
  float* h = head_state(p, s.segment, s.head);
  const int64_t fitting = kBlockElements / p.key_width / kRowGroup * kRowGroup;
  for (int64_t row = s.begin; row < s.end; row += fitting)
    advance_tokens(p, h + row * p.key_width, t, stop, t == s.first, s.head, row,
                   least(fitting, s.end - row));
}

inline void recurrent(const RecurrentParams& p, int64_t task) {
  const Share s = share_of(p, task);
  if (task + 1 < p.tasks()) {
    const Share next = share_of(p, task + 1);
    fetch_next_slot(p, s, next);
    fetch_token(p, next.first, next.head, next.begin, next.end - next.begin);
  }
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
