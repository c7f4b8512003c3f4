// The recurrence as the code of one CUDA thread: S ← S diag(w) + (S a) bᵀ + v kᵀ, out = S q, token
// after token. The plain form, without w, a and b, is compiled apart.
//
// A group of lanes covers the keys of a value row, 16 bytes a lane, and holds several rows in
// registers, so that a row of state is read once and written once whatever the length of the
// segment. The sum of a row runs over the elements of a lane first and then over the lanes,
// pairwise, at distances that halve: one order whatever the batch. Shuffles and barriers are
// methods of a `Team`; a host build replaces them by loops.
#pragma once

#include "memory.cuh"
#include "tiling.cuh"

namespace cottention::cuda {

// row += value × key; returns total + row · query.
COTTENTION_HD float update(Quad& row, float value, const Quad& key, const Quad& query,
                           float total) {
  COTTENTION_UNROLL
  for (int i = 0; i < 4; ++i) {
    row.x[i] = fmaf(value, key.x[i], row.x[i]);
    total = fmaf(row.x[i], query.x[i], total);
  }
  return total;
}

COTTENTION_HD float dot(const Quad& x, const Quad& y, float total) {
  COTTENTION_UNROLL
  for (int i = 0; i < 4; ++i) total = fmaf(x.x[i], y.x[i], total);
  return total;
}

// What all rows have in common at four keys; a decay that is absent is 1, an absent b is 0.
struct Keys {
  Quad k, q, w, b;
};

// row ← value k + (s b + w row); returns total + row · q.
COTTENTION_HD float update(Quad& row, float value, float s, const Keys& keys, float total) {
  COTTENTION_UNROLL
  for (int i = 0; i < 4; ++i) row.x[i] = fmaf(s, keys.b.x[i], row.x[i] * keys.w.x[i]);
  return update(row, value, keys.k, keys.q, total);
}

// One thread of a block; In is the type of q, k, v and Out that of the outputs.
template <class In, class Out, class TileShape>
struct Thread {
  static constexpr int kSums = TileShape::kRows + 1;

  int thread, lane, group;
  int row, rows_left;  // its first value row, and the rows of the head from there on
  float* own;          // the state at that row and at the lane's first key
  Quad h[TileShape::kRows][TileShape::kPieces];
  Quad z[TileShape::kPieces];
  float sums[kSums];  // of each row, and of the denominator
  float reads[TileShape::kRows];  // S a of each row

  COTTENTION_HD explicit Thread(int index)
      : thread(index), lane(index % TileShape::kLanes), group(index / TileShape::kLanes) {}

  // Rows of a thread are kGroups apart, its pieces of a row kLanes quads.
  COTTENTION_HD bool has_row(int r) const { return r * TileShape::kGroups < rows_left; }
  COTTENTION_HD int column(int i) const { return 4 * (lane + i * TileShape::kLanes); }
  COTTENTION_HD float* piece(const StepParams& p, int r, int i) const {
    return own + (r * TileShape::kGroups * p.key_width + 4 * i * TileShape::kLanes);
  }
  COTTENTION_HD float* z_piece(const StepParams& p, const BlockTask& task, int i) const {
    return p.z + task.slot * p.z_stride + int64_t(task.head) * p.key_width + column(i);
  }
  COTTENTION_HD static Out* output(const StepParams& p, const BlockTask& task, int64_t token) {
    return static_cast<Out*>(p.out) + token * p.out_stride + task.head * p.value_width;
  }
  COTTENTION_HD static const In* input(const View& x, const BlockTask& task, int64_t token) {
    return static_cast<const In*>(x.data) + token * x.token_stride + task.head * x.head_stride;
  }

  // Loads the rows of a tile; elements outside the head are zero and stay zero.
  COTTENTION_HD void load(const StepParams& p, const BlockTask& task, int tile) {
    row = tile * TileShape::kTileRows + group;
    rows_left = p.value_width - row;
    own = p.state + task.slot * p.state_stride +
          (int64_t(task.head) * p.value_width + row) * p.key_width + 4 * lane;
    COTTENTION_UNROLL
    for (int r = 0; r < TileShape::kRows; ++r) COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i)
      h[r][i] = has_row(r) && column(i) < p.key_width ? load_state(piece(p, r, i)) : Quad{};
    if (!p.z) return;
    COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i)
      z[i] = column(i) < p.key_width ? load_state(z_piece(p, task, i)) : Quad{};
  }

  // Updates the state by one token; `sums` get this lane's part of every sum.
  COTTENTION_HD void advance(const StepParams& p, const BlockTask& task, int64_t token) {
    const In* v = input(p.v, task, token) + row;
    float value[TileShape::kRows];
    COTTENTION_UNROLL
    for (int r = 0; r < TileShape::kRows; ++r)
      value[r] = has_row(r) ? float(v[r * TileShape::kGroups]) : 0.0f;
    COTTENTION_UNROLL
    for (int s = 0; s < kSums; ++s) sums[s] = 0.0f;
    COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i) {
      if (column(i) >= p.key_width) break;
      const Quad key = load_input(input(p.k, task, token) + column(i), p.is_aligned);
      const Quad query = load_input(input(p.q, task, token) + column(i), p.is_aligned);
      COTTENTION_UNROLL
      for (int r = 0; r < TileShape::kRows; ++r)
        sums[r] = update(h[r][i], value[r], key, query, sums[r]);
      if (p.z) sums[TileShape::kRows] = update(z[i], 1.0f, key, query, sums[TileShape::kRows]);
    }
  }

  COTTENTION_HD static const float* term(const View& x, const BlockTask& task, int64_t token) {
    return static_cast<const float*>(x.data) + token * x.token_stride + task.head * x.head_stride;
  }

  COTTENTION_HD Keys load_keys(const StepParams& p, const BlockTask& task, int64_t token,
                               int i) const {
    Keys keys{load_input(input(p.k, task, token) + column(i), p.is_aligned),
              load_input(input(p.q, task, token) + column(i), p.is_aligned),
              {{1.0f, 1.0f, 1.0f, 1.0f}},
              {}};
    if (p.decay == Decay::kPerHead) {
      const float w = *term(p.w, task, token);
      keys.w = {{w, w, w, w}};
    }
    if (p.decay == Decay::kPerKey)
      keys.w = load_input(term(p.w, task, token) + column(i), p.is_terms_aligned);
    if (p.has_term) keys.b = load_input(term(p.b, task, token) + column(i), p.is_terms_aligned);
    return keys;
  }

  // `reads` get this lane's part of S a, of the state before the token.
  COTTENTION_HD void read(const StepParams& p, const BlockTask& task, int64_t token) {
    COTTENTION_UNROLL
    for (int r = 0; r < TileShape::kRows; ++r) reads[r] = 0.0f;
    if (!p.has_term) return;
    COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i) {
      if (column(i) >= p.key_width) break;
      const Quad a = load_input(term(p.a, task, token) + column(i), p.is_terms_aligned);
      COTTENTION_UNROLL
      for (int r = 0; r < TileShape::kRows; ++r) reads[r] = dot(h[r][i], a, reads[r]);
    }
  }

  // `advance` with w, a and b; the reads must be reduced over the lanes.
  COTTENTION_HD void advance_general(const StepParams& p, const BlockTask& task, int64_t token) {
    const In* v = input(p.v, task, token) + row;
    float value[TileShape::kRows];
    COTTENTION_UNROLL
    for (int r = 0; r < TileShape::kRows; ++r)
      value[r] = has_row(r) ? float(v[r * TileShape::kGroups]) : 0.0f;
    COTTENTION_UNROLL
    for (int s = 0; s < kSums; ++s) sums[s] = 0.0f;
    COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i) {
      if (column(i) >= p.key_width) break;
      const Keys keys = load_keys(p, task, token, i);
      COTTENTION_UNROLL
      for (int r = 0; r < TileShape::kRows; ++r)
        sums[r] = update(h[r][i], value[r], reads[r], keys, sums[r]);
      if (p.z) sums[TileShape::kRows] = update(z[i], 1.0f, 0.0f, keys, sums[TileShape::kRows]);
    }
  }

  // Stores the outputs of a token; the sums must be reduced over the lanes.
  COTTENTION_HD void write(const StepParams& p, const BlockTask& task, int64_t token) {
    if (lane != 0) return;
    if (p.z) divide();
    Out* out = output(p, task, token) + row;
    COTTENTION_UNROLL
    for (int r = 0; r < TileShape::kRows; ++r)
      if (has_row(r)) out[r * TileShape::kGroups] = Out(sums[r]);
  }

  COTTENTION_HD void divide() {
    const float total = sums[TileShape::kRows];
    const float denominator = total < kDenominatorFloor ? kDenominatorFloor : total;
    COTTENTION_UNROLL
    for (int r = 0; r < TileShape::kRows; ++r) sums[r] /= denominator;
  }

  COTTENTION_HD void store(const StepParams& p) const {
    COTTENTION_UNROLL
    for (int r = 0; r < TileShape::kRows; ++r) COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i)
      if (has_row(r) && column(i) < p.key_width) store_state(piece(p, r, i), h[r][i]);
  }

  // Every group of lanes holds all of z; one writes it, after all groups have read the old values.
  COTTENTION_HD void store_z(const StepParams& p, const BlockTask& task) const {
    COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i)
      if (group == 0 && column(i) < p.key_width) store_state(z_piece(p, task, i), z[i]);
  }

  // Writes zeros for a segment without a slot.
  COTTENTION_HD void clear(const StepParams& p, const BlockTask& task) const {
    const int end = min(task.tile_end * TileShape::kTileRows, p.value_width);
    for (int64_t t = task.first; t < task.last; ++t)
      for (int i = task.tile * TileShape::kTileRows + thread; i < end; i += kThreads)
        output(p, task, t)[i] = Out(0.0f);
  }
};

// The work of a block. A Team is its threads: one on a GPU, all of them in turn on a host.
template <class TileShape, bool kIsDecode, bool kIsGeneral, class Team>
COTTENTION_HD void run_block(const StepParams& p, uint32_t block, Team& team) {
  const BlockTask task = block_task<TileShape, kIsDecode>(p, block);
  if (!kIsDecode && task.first >= task.last) return;
  if (!task.is_active) return team.clear(p, task);
  for (int tile = task.tile; tile < task.tile_end; ++tile) {
    team.load(p, task, tile);
    for (int64_t t = task.first; t < task.last; ++t) {
      if constexpr (kIsGeneral) {
        team.read(p, task, t);
        team.reduce_reads();
        team.advance_general(p, task, t);
      } else {
        team.advance(p, task, t);
      }
      team.reduce();
      team.write(p, task, t);
    }
    team.store(p);
  }
  if (p.z) team.sync_and_store_z(p, task);
}

}  // namespace cottention::cuda
