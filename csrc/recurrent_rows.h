// One token on a block of value rows: S ← S diag(w) + (S a) bᵀ + v kᵀ, out = S q.
//
// Rows in the cache are updated side by side, rows from memory one after the other. The arithmetic
// is the same: h ← v k + (s b + w h), of which terms that are absent are left out, with one chain
// of sixteen lanes along the keys for each of s = h · a and out = h · q, reduced in one order.
// Included by kernels.cpp only.
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

// So much arithmetic lies between the rows in memory that some hardware prefetchers are late: on
// Zen 5 with AVX-512 a step had 0.5 to 0.75 of the stream's speed without the lines ahead. 4 KB
// ahead measured the same or slower, except for narrow rows that a term reads first; 8 KB slower.
constexpr int64_t kElementsAhead = 512;
constexpr int64_t kNarrowElementsAhead = 1024;
constexpr int64_t kNarrow = 64;

// Whether the registers hold all keys of a narrow row's step that has a term.
#if defined(__AVX512F__)
constexpr bool kHoldsTerms = true;
#else
constexpr bool kHoldsTerms = false;
#endif

// Which terms a step has, known when it is compiled.
template <Decay kDecay_, bool kHasTerm_>
struct Form {
  static constexpr Decay kDecay = kDecay_;
  static constexpr bool kHasTerm = kHasTerm_;  // (S a) bᵀ
};
using Plain = Form<Decay::kNone, false>;

// Rows in the cache that are updated side by side: as many as the registers allow. Of rows from
// memory two, if a term reads them first.
template <class Form>
constexpr int kCachedRows = Form::kHasTerm && !kHoldsTerms ? 2 : 4;
constexpr int kTermRows = 2;

inline Quad finish_four(const Lanes* total) {
  return finish(fold(total[0]), fold(total[1]), fold(total[2]), fold(total[3]));
}

// The operands of one token on a block of rows; out is divided by `denominator` if there is one.
struct Token {
  const float *q, *k, *v;
  const float *w, *a, *b;  // those that the form has
  float* out;
  bool has_denominator;
  float denominator;
  bool prefetches;
};

template <class Form>
inline Token token_of(const RecurrentParams& p, int64_t token, int64_t head, int64_t row) {
  return {p.q.at(token, head),
          p.k.at(token, head),
          p.v.at(token, head) + row,
          Form::kDecay != Decay::kNone ? p.w.at(token, head) : nullptr,
          Form::kHasTerm ? p.a.at(token, head) : nullptr,
          Form::kHasTerm ? p.b.at(token, head) : nullptr,
          p.out_at(token, head) + row,
          p.denominators != nullptr,
          p.denominators ? p.denominators[token * p.heads + head] : 1.0f,
          p.prefetches};
}

// What sixteen keys of all rows have in common.
struct Keys {
  Lanes k, q, w, a, b;
};

template <class Form>
inline Keys load_keys(const Token& t, int64_t j, Lanes head_decay) {
  Keys keys{load(t.k + j), load(t.q + j), head_decay, head_decay, head_decay};
  if (Form::kDecay == Decay::kPerKey) keys.w = load(t.w + j);
  if (Form::kHasTerm) keys.a = load(t.a + j);
  if (Form::kHasTerm) keys.b = load(t.b + j);
  return keys;
}

template <class Form>
inline Keys load_half_keys(const Token& t, int64_t j, Lanes head_decay) {
  Keys keys{load_half(t.k + j), load_half(t.q + j), head_decay, head_decay, head_decay};
  if (Form::kDecay == Decay::kPerKey) keys.w = load_half(t.w + j);
  if (Form::kHasTerm) keys.a = load_half(t.a + j);
  if (Form::kHasTerm) keys.b = load_half(t.b + j);
  return keys;
}

template <class Form>
inline Lanes head_decay_of(const Token& t) {
  return broadcast(Form::kDecay == Decay::kPerHead ? *t.w : 0.0f);
}

// v k + (s b + w h) for sixteen keys of one row.
template <class Form>
inline Lanes updated(Lanes h, Lanes v, Lanes s, const Keys& keys) {
  if (Form::kDecay != Decay::kNone) h = multiply(h, keys.w);
  if (Form::kHasTerm) h = multiply_add(s, keys.b, h);
  return multiply_add(v, keys.k, h);
}

// Sixteen keys of one row: updates h, total += h · query.
template <class Form>
inline Lanes advance_lanes(float* h, Lanes v, Lanes s, const Keys& keys, Lanes total) {
  const Lanes row = updated<Form>(load(h), v, s, keys);
  store(h, row);
  return multiply_add(row, keys.q, total);
}

template <class Form>
inline Lanes advance_half(float* h, Lanes v, Lanes s, const Keys& keys, Lanes total) {
  const Lanes row = updated<Form>(load_half(h), v, s, keys);
  store_half(h, row);
  return multiply_add(row, keys.q, total);
}

// h · a of one row, in sixteen lanes.
inline Lanes read_row(const float* h, const float* a, int64_t width) {
  Lanes total = broadcast(0.0f);
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) total = multiply_add(load(h + j), load(a + j), total);
  return j < width ? multiply_add(load_half(h + j), load_half(a + j), total) : total;
}

// One token on kRows value rows: updates h [kRows, width] in place, total[r] = h_r · q in sixteen
// lanes. Each key is loaded once for all rows.
template <class Form, int kRows>
inline void advance_rows(float* h, const Token& t, const float* values, int64_t width,
                         Lanes* total) {
  Part v[kRows], s[kRows], sums[kRows][kParts] = {};
  if (Form::kHasTerm)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) total[r] = read_row(h + r * width, t.a, width);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    v[r] = broadcast_part(values[r]);
    s[r] = Form::kHasTerm ? broadcast_part(sum(total[r])) : v[r];
  }
  const Part decay = broadcast_part(Form::kDecay == Decay::kPerHead ? *t.w : 0.0f);
  int64_t j = 0;
#pragma GCC unroll 4
  for (; j + kLanes <= width; j += kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) {
      const int64_t at = j + i * kPartLanes;
      const Part w = Form::kDecay == Decay::kPerKey ? load_part(t.w + at) : decay;
      const Part b = Form::kHasTerm ? load_part(t.b + at) : w;
      const Part k = load_part(t.k + at), q = load_part(t.q + at);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        Part row = load_part(h + r * width + at);
        if (Form::kDecay != Decay::kNone) row *= w;
        if (Form::kHasTerm) row = multiply_add(s[r], b, row);
        row = multiply_add(v[r], k, row);
        store_part(h + r * width + at, row);
        sums[r][i] = multiply_add(row, q, sums[r][i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) __builtin_memcpy(total + r, sums[r], sizeof *total);
  if (j == width) return;
  const Keys keys = load_half_keys<Form>(t, j, head_decay_of<Form>(t));
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    total[r] = advance_half<Form>(h + r * width + j, broadcast(values[r]), broadcast(s[r][0]), keys,
                                  total[r]);
}

// The same on kRowGroup rows, kRows at a time.
template <class Form, int kRows>
inline void advance_group(float* h, const Token& t, int64_t row, int64_t width, Lanes* total) {
#pragma GCC unroll 4
  for (int r = 0; r < kRowGroup; r += kRows)
    advance_rows<Form, kRows>(h + r * width, t, t.v + row + r, width, total + r);
}

[[gnu::always_inline]] inline void prefetch_ahead(const Token& t, const float* h, int64_t count,
                                                  int64_t ahead) {
  if (!t.prefetches) return;
  prefetch_pages(h, count);
  prefetch_lines(h + ahead, count);
}

// The same on rows that are read from memory, in memory order. With a term that reads the state,
// that term does the reading.
template <class Form>
inline void stream_rows(float* h, const Token& t, int64_t row, int64_t width, Lanes* total) {
  const bool is_late = Form::kHasTerm && width <= kNarrow;
  prefetch_ahead(t, h, kRowGroup * width, is_late ? kNarrowElementsAhead : kElementsAhead);
  if (Form::kHasTerm) return advance_group<Form, kTermRows>(h, t, row, width, total);
  const Lanes decay = head_decay_of<Form>(t);
  for (int r = 0; r < kRowGroup; ++r, h += width) {
    const Lanes v = broadcast(t.v[row + r]);
    Lanes sum = broadcast(0.0f);
    int64_t j = 0;
    for (; j + kLanes <= width; j += kLanes)
      sum = advance_lanes<Form>(h + j, v, v, load_keys<Form>(t, j, decay), sum);
    total[r] = j < width
                   ? advance_half<Form>(h + j, v, v, load_half_keys<Form>(t, j, decay), sum)
                   : sum;
  }
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

// stream_rows for the common widths, with all that the rows share in registers.
template <class Form, int kHeld>
inline void stream_held_rows(float* h, const Token& t, int64_t row, const Keys* keys,
                             Lanes* total) {
  constexpr int64_t kWidth = kHeld * kLanes;
  prefetch_ahead(t, h, kRowGroup * kWidth, Form::kHasTerm ? kNarrowElementsAhead : kElementsAhead);
#pragma GCC unroll 8
  for (int r = 0; r < kRowGroup; ++r, h += kWidth) {
    const Lanes v = broadcast(t.v[row + r]);
    Lanes s = broadcast(0.0f);
    if (Form::kHasTerm) {
#pragma GCC unroll 8
      for (int j = 0; j < kHeld; ++j) s = multiply_add(load(h + j * kLanes), keys[j].a, s);
      s = broadcast(sum(s));
    }
    total[r] = broadcast(0.0f);
#pragma GCC unroll 8
    for (int j = 0; j < kHeld; ++j)
      total[r] = advance_lanes<Form>(h + j * kLanes, v, s, keys[j], total[r]);
  }
}

// One token on a block of rows from memory.
template <class Form, int kHeld>
[[gnu::noinline, gnu::flatten]] void stream_held(const Token& given, float* h, int64_t rows) {
  const Token t = given;  // in registers: no store can change it
  Lanes total[kRowGroup];
  Keys keys[kHeld];
  const Lanes decay = head_decay_of<Form>(t);
#pragma GCC unroll 8
  for (int j = 0; j < kHeld; ++j) keys[j] = load_keys<Form>(t, j * kLanes, decay);
  for (int64_t r = 0; r < rows; r += kRowGroup) {
    stream_held_rows<Form, kHeld>(h + r * kHeld * kLanes, t, r, keys, total);
    write_outputs(t, r, total);
  }
}

template <class Form>
[[gnu::noinline, gnu::flatten]] void stream_wide(const Token& given, float* h, int64_t width,
                                                 int64_t rows) {
  const Token t = given;
  Lanes total[kRowGroup];
  for (int64_t r = 0; r < rows; r += kRowGroup) {
    stream_rows<Form>(h + r * width, t, r, width, total);
    write_outputs(t, r, total);
  }
}

// One token on a block of rows [rows, width] from memory.
template <class Form>
inline void stream_block(const Token& t, float* h, int64_t width, int64_t rows) {
  if ((!Form::kHasTerm || kHoldsTerms) && width == 4 * kLanes)
    return stream_held<Form, 4>(t, h, rows);
  if (!Form::kHasTerm && width == 8 * kLanes) return stream_held<Form, 8>(t, h, rows);
  // The same with loops along the keys that are unrolled.
  if (Form::kHasTerm && !kHoldsTerms && width == kNarrow)
    return stream_wide<Form>(t, h, kNarrow, rows);
  stream_wide<Form>(t, h, width, rows);
}

// One token on a block of rows [rows, width] in the cache.
template <class Form>
inline void advance_block(const Token& t, float* h, int64_t width, int64_t rows) {
  Lanes total[kRowGroup];
  for (int64_t r = 0; r < rows; r += kRowGroup) {
    advance_group<Form, kCachedRows<Form>>(h + r * width, t, r, width, total);
    write_outputs(t, r, total);
  }
}

}  // namespace cottention::COTTENTION_ISA
