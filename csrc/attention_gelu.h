// Between a layer's two products, in one pass: features, the recurrence, and the MLP's gelu.
//
// A task is one head of one segment, as in recurrent.h, with its share of the segment's gelu. Keys,
// queries and values are mapped a chunk of tokens at a time into the first caches and used there.
// The arithmetic is that of elementwise.h and recurrent.h, bit for bit. Included by kernels.cpp
// only.
#pragma once

#include "elementwise.h"
#include "kernels.h"
#include "recurrent.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

// Tokens [t, stop) of a share, mapped and run.
inline void mix_chunk(const MixParams& m, const Share& s, int64_t t, int64_t stop) {
  alignas(64) float q[kTokenChunk * kMaxValueWidth];
  alignas(64) float k[kTokenChunk * kMaxValueWidth];
  alignas(64) float v[kTokenChunk * kMaxValueWidth];
  const int64_t width = m.features.width;
  for (int64_t i = 0; i < stop - t; ++i)
    map_head(m.features, t + i, s.head, q + i * width, k + i * width, v + i * width);
  RecurrentParams p = m.recurrent;
  p.q = {q, width, 0, t};
  p.k = {k, width, 0, t};
  p.v = {v, width, 0, t};
  advance_chunk(p, s, t, stop);
}

// The columns of gelu that fall to a task, in whole lanes, for its segment's tokens.
inline void gelu_share(const MixParams& m, const Share& s, int64_t part, int64_t parts) {
  const int64_t lanes = (m.gelu.columns + kLanes - 1) / kLanes;
  const int64_t first = part * lanes / parts * kLanes;
  const int64_t last = least((part + 1) * lanes / parts * kLanes, m.gelu.columns);
  for (int64_t t = s.first; t < s.last; ++t)
    gelu_of(m.gelu.x + t * m.gelu.x_stride + first, last - first,
            m.gelu.out + t * m.gelu.out_stride + first);
}

inline void mix(const MixParams& m, int64_t task) {
  const RecurrentParams& p = m.recurrent;
  const Share s = share_of(p, task);
  if (task + 1 < p.tasks()) fetch_next_slot(p, s, share_of(p, task + 1));
  const int64_t parts = p.heads * p.shares();
  gelu_share(m, s, task % parts, parts);
  if (p.slots[s.segment] == kPaddingSlot)
    return zero_outputs(p, s.segment, s.head, s.begin, s.end - s.begin);
  for (int64_t t = s.first; t < s.last; t += kTokenChunk)
    mix_chunk(m, s, t, least(t + kTokenChunk, s.last));
}

}  // namespace cottention::COTTENTION_ISA
