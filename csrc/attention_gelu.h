// Everything between the two products of a parallel block, in one pass: the feature map, the
// recurrence and the MLP's gelu.
//
// A task is one head of one segment, as in recurrent.h, and its part of the segment's gelu.
// Queries, keys and values are mapped one chunk of tokens at a time into buffers that fit the L1
// and L2 caches and are used from there. The arithmetic equals elementwise.h and recurrent.h bit
// for bit. Included by kernels.cpp only.
#pragma once

#include "elementwise.h"
#include "kernels.h"
#include "recurrent.h"
#include "simd.h"

namespace cottention::COTTENTION_ISA {

// Maps tokens [t, stop) of a task and runs the recurrence on them.
inline void attention_chunk(const AttentionGeluParams& m, const HeadTask& s, int64_t t,
                            int64_t stop) {
  alignas(64) float q[kTokenChunk * kMaxFusedWidth];
  alignas(64) float k[kTokenChunk * kMaxFusedWidth];
  alignas(64) float v[kTokenChunk * kMaxFusedWidth];
  const int64_t width = m.features.width;
  for (int64_t i = 0; i < stop - t; ++i)
    map_head(m.features, t + i, s.head, q + i * width, k + i * width, v + i * width);
  RecurrentParams p = m.recurrent;
  p.q = {q, width, 0, t};
  p.k = {k, width, 0, t};
  p.v = {v, width, 0, t};
  advance_chunk<Plain>(p, s, t, stop);
}

// Gelu of part `part` of `parts` of the columns, in whole vectors, for the tokens of a segment.
inline void gelu_columns(const AttentionGeluParams& m, const HeadTask& s, int64_t part,
                         int64_t parts) {
  const int64_t lanes = (m.gelu.columns + kLanes - 1) / kLanes;
  const int64_t first = part * lanes / parts * kLanes;
  const int64_t last = min((part + 1) * lanes / parts * kLanes, m.gelu.columns);
  for (int64_t t = s.first; t < s.last; ++t)
    gelu_of(m.gelu.x + t * m.gelu.x_stride + first, last - first,
            m.gelu.out + t * m.gelu.out_stride + first);
}

inline void attention_gelu(const AttentionGeluParams& m, int64_t task) {
  const RecurrentParams& p = m.recurrent;
  const HeadTask s = head_task(p, task);
  if (p.prefetches && task + 1 < p.tasks()) prefetch_next_state(p, s, head_task(p, task + 1));
  const int64_t parts = p.heads * p.row_splits;
  gelu_columns(m, s, task % parts, parts);
  if (p.state_indices[s.segment] == kPaddingSlot)
    return zero_outputs(p, s.segment, s.head, s.begin, s.end - s.begin);
  for (int64_t t = s.first; t < s.last; t += kTokenChunk)
    attention_chunk(m, s, t, min(t + kTokenChunk, s.last));
}

}  // namespace cottention::COTTENTION_ISA
