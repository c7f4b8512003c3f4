// The recurrence on value rows: S ← S diag(w) + (S a) bᵀ + v kᵀ, out = S q, token after token.
//
// A block of value rows stays in the L1 cache for a chunk of tokens, and the rows of a head in the
// L2 cache for the whole segment, so prefill reads and writes the state once. A token's arithmetic
// (recurrent_rows.h) is the same in prefill and in decode. Included by kernels.cpp only.
#pragma once

#include "kernels.h"
#include "recurrent_rows.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

constexpr int64_t kTokensAhead = 2;
constexpr int64_t kTokenChunk = 32;       // its keys and queries stay in the L2 cache
constexpr int64_t kBlockElements = 4096;  // 16 KB of state: half of a small L1 cache

inline void zero_outputs(const RecurrentParams& p, int64_t segment, int64_t head, int64_t row,
                         int64_t rows) {
  for (int64_t t = p.first(segment); t < p.first(segment + 1); ++t)
    __builtin_memset(p.out_at(t, head) + row, 0, rows * sizeof(float));
}

// The rows of two tokens are too far apart for the hardware prefetcher. Above all, stores to `out`
// that miss the cache would delay the stores to the state, since stores retire in order.
template <class Form>
[[gnu::always_inline]] inline void prefetch_token(const RecurrentParams& p, int64_t token,
                                                  int64_t head, int64_t row, int64_t rows) {
  for (int64_t j = 0; j < p.key_width; j += kLanes) {
    __builtin_prefetch(p.q.at(token, head) + j);
    __builtin_prefetch(p.k.at(token, head) + j);
    if (Form::kDecay == Decay::kPerKey) __builtin_prefetch(p.w.at(token, head) + j);
    if (Form::kHasTerm) __builtin_prefetch(p.a.at(token, head) + j);
    if (Form::kHasTerm) __builtin_prefetch(p.b.at(token, head) + j);
  }
  for (int64_t r = row; r < row + rows; r += kLanes) {
    __builtin_prefetch(p.v.at(token, head) + r);
    __builtin_prefetch(p.out_at(token, head) + r, 1);
  }
}

// Tokens [first, last) on a block of rows.
template <class Form>
inline void advance_tokens(const RecurrentParams& p, float* h, int64_t first, int64_t last,
                           bool is_start, int64_t head, int64_t row, int64_t rows) {
  for (int64_t t = first; t < last; ++t) {
    if (p.prefetches && t + kTokensAhead < last)
      prefetch_token<Form>(p, t + kTokensAhead, head, row, rows);
    const Token token = token_of<Form>(p, t, head, row);
    if (is_start && t == first)
      stream_block<Form>(token, h, p.key_width, rows);
    else
      advance_block<Form>(token, h, p.key_width, rows);
  }
}

// A task: value rows [begin, end) of one head of one segment, which has the tokens [first, last).
struct HeadTask {
  int64_t segment, head, first, last, begin, end;
};

inline HeadTask head_task(const RecurrentParams& p, int64_t task) {
  const int64_t whole = p.row_splits == 1 ? task : task / p.row_splits;
  const int64_t begin = (task - whole * p.row_splits) * p.rows_per_split;
  const int64_t end = min(begin + p.rows_per_split, p.value_width);
  const int64_t place = whole / p.heads, head = whole - place * p.heads;
  const int64_t segment = p.order ? p.order[place] : place;
  return {segment, head, p.first(segment), p.first(segment + 1), begin, end};
}

inline float* head_state(const RecurrentParams& p, int64_t segment, int64_t head) {
  return p.state + p.state_indices[segment] * p.state_stride + head * p.value_width * p.key_width;
}

// The state of the next task, if that is in another slot; prefetch_pages covers the same slot.
[[gnu::always_inline]] inline void prefetch_next_state(const RecurrentParams& p,
                                                       const HeadTask& now, const HeadTask& next) {
  if (next.segment == now.segment || p.state_indices[next.segment] == kPaddingSlot) return;
  const float* h = head_state(p, next.segment, next.head);
  __builtin_prefetch(h);
  __builtin_prefetch(h + kPage / sizeof(float));
}

// Tokens [t, stop) of a task, at most kTokenChunk of them.
template <class Form>
inline void advance_chunk(const RecurrentParams& p, const HeadTask& s, int64_t t, int64_t stop) {
  float* h = head_state(p, s.segment, s.head);
  const int64_t block_rows = kBlockElements / p.key_width / kRowGroup * kRowGroup;
  for (int64_t row = s.begin; row < s.end; row += block_rows)
    advance_tokens<Form>(p, h + row * p.key_width, t, stop, t == s.first, s.head, row,
                   min(block_rows, s.end - row));
}

template <class Form>
inline void recurrent_as(const RecurrentParams& p, int64_t task) {
  const HeadTask s = head_task(p, task);
  if (p.prefetches && task + 1 < p.tasks()) {
    const HeadTask next = head_task(p, task + 1);
    prefetch_next_state(p, s, next);
    prefetch_token<Form>(p, next.first, next.head, next.begin, next.end - next.begin);
  }
  if (p.state_indices[s.segment] == kPaddingSlot)
    return zero_outputs(p, s.segment, s.head, s.begin, s.end - s.begin);
  if (s.last - s.first == 1)
    return stream_block<Form>(token_of<Form>(p, s.first, s.head, s.begin),
                              head_state(p, s.segment, s.head) + s.begin * p.key_width, p.key_width,
                              s.end - s.begin);
  for (int64_t t = s.first; t < s.last; t += kTokenChunk)
    advance_chunk<Form>(p, s, t, min(t + kTokenChunk, s.last));
}

// Calls visit with the form of the step that the parameters ask for.
template <class Visit>
inline void with_form(const RecurrentParams& p, const Visit& visit) {
  switch (p.decay) {
    case Decay::kNone:
      return p.has_term ? visit(Form<Decay::kNone, true>{}) : visit(Plain{});
    case Decay::kPerHead:
      return p.has_term ? visit(Form<Decay::kPerHead, true>{})
                        : visit(Form<Decay::kPerHead, false>{});
    case Decay::kPerKey:
      return p.has_term ? visit(Form<Decay::kPerKey, true>{})
                        : visit(Form<Decay::kPerKey, false>{});
  }
}

inline void recurrent(const RecurrentParams& p, int64_t task) {
  with_form(p, [&](auto form) { recurrent_as<decltype(form)>(p, task); });
}

inline Lanes decayed_z(const RecurrentParams& p, Lanes z, const float* w, int64_t j, bool is_half) {
  if (p.decay == Decay::kNone) return z;
  if (p.decay == Decay::kPerHead) return multiply(z, broadcast(*w));
  return multiply(z, is_half ? load_half(w + j) : load(w + j));
}

// z ← w z + k along a segment; denominators[t] = max(z · q, floor).
inline void denominators(const RecurrentParams& p, int64_t task) {
  const int64_t head = task % p.heads, segment = task / p.heads;
  const int32_t slot = p.state_indices[segment];
  if (slot == kPaddingSlot) return;
  float* z = p.z + slot * p.z_stride + head * p.key_width;
  for (int64_t t = p.first(segment); t < p.first(segment + 1); ++t) {
    const float* q = p.q.at(t, head);
    const float* k = p.k.at(t, head);
    const float* w = p.decay == Decay::kNone ? nullptr : p.w.at(t, head);
    Lanes total = broadcast(0.0f);
    int64_t j = 0;
    for (; j + kLanes <= p.key_width; j += kLanes) {
      const Lanes row = add(decayed_z(p, load(z + j), w, j, false), load(k + j));
      store(z + j, row);
      total = multiply_add(row, load(q + j), total);
    }
    if (j < p.key_width) {
      const Lanes row = add(decayed_z(p, load_half(z + j), w, j, true), load_half(k + j));
      store_half(z + j, row);
      total = multiply_add(row, load_half(q + j), total);
    }
    const float value = sum(total);
    p.denominators[t * p.heads + head] = value < kDenominatorFloor ? kDenominatorFloor : value;
  }
}

}  // namespace cottention::COTTENTION_ISA
