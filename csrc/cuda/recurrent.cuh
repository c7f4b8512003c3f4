// The recurrence as one CUDA thread sees it: state += v ⊗ k, out = state q, token after token.
//
// A group of lanes lies along the keys of a value row, sixteen bytes a lane, and holds several rows
// in registers, so that a row of state is read once and written once whatever the segment's
// length. A row's sum runs over its lane's own elements first and then over the lanes, pairwise,
// at distances that halve: one order whatever the batch. Owns all arithmetic; what only a GPU can
// do (shuffle, barrier) is asked of a `Team`, which a host build replaces by loops.
#pragma once

#include "memory.cuh"
#include "tiling.cuh"

namespace cottention::cuda {

// row += value · key; returns total + row · query.
COTTENTION_HD float moved(Quad& row, float value, const Quad& key, const Quad& query, float total) {
  COTTENTION_UNROLL
  for (int i = 0; i < 4; ++i) {
    row.x[i] = fmaf(value, key.x[i], row.x[i]);
    total = fmaf(row.x[i], query.x[i], total);
  }
  return total;
}

// One thread of a block; In is the type of q, k, v and Out that of the outputs.
template <class In, class Out, class Shape>
struct Thread {
  static constexpr int kSums = Shape::kRows + 1;

  int thread, lane, group;
  int row, rows_left;  // its first value row, and how many the head has from there
  float* own;          // the state at that row and at the lane's first key
  Quad h[Shape::kRows][Shape::kPieces];
  Quad z[Shape::kPieces];
  float sums[kSums];  // of each row, and of the denominator

  COTTENTION_HD explicit Thread(int index)
      : thread(index), lane(index % Shape::kLanes), group(index / Shape::kLanes) {}

  // Rows of a thread are kGroups apart, its pieces of a row kLanes quads.
  COTTENTION_HD bool has_row(int r) const { return r * Shape::kGroups < rows_left; }
  COTTENTION_HD int column(int i) const { return 4 * (lane + i * Shape::kLanes); }
  COTTENTION_HD float* piece(const StepParams& p, int r, int i) const {
    return own + (r * Shape::kGroups * p.key_width + 4 * i * Shape::kLanes);
  }
  COTTENTION_HD float* z_piece(const StepParams& p, const Place& at, int i) const {
    return p.z + at.slot * p.z_stride + int64_t(at.head) * p.key_width + column(i);
  }
  COTTENTION_HD static Out* output(const StepParams& p, const Place& at, int64_t token) {
    return static_cast<Out*>(p.out) + token * p.out_stride + at.head * p.value_width;
  }
  COTTENTION_HD static const In* input(const View& x, const Place& at, int64_t token) {
    return static_cast<const In*>(x.data) + token * x.token_stride + at.head * x.head_stride;
  }

  // A tile's rows from memory; what lies outside the head is zero and stays zero.
  COTTENTION_HD void load(const StepParams& p, const Place& at, int tile) {
    row = tile * Shape::kTileRows + group;
    rows_left = p.value_width - row;
    own = p.state + at.slot * p.state_stride +
          (int64_t(at.head) * p.value_width + row) * p.key_width + 4 * lane;
    COTTENTION_UNROLL
    for (int r = 0; r < Shape::kRows; ++r)
      COTTENTION_UNROLL
      for (int i = 0; i < Shape::kPieces; ++i)
        h[r][i] = has_row(r) && column(i) < p.key_width ? load_state(piece(p, r, i)) : Quad{};
    if (!p.z) return;
    COTTENTION_UNROLL
    for (int i = 0; i < Shape::kPieces; ++i)
      z[i] = column(i) < p.key_width ? load_state(z_piece(p, at, i)) : Quad{};
  }

  // One token: this lane's share of every sum.
  COTTENTION_HD void advance(const StepParams& p, const Place& at, int64_t token) {
    const In* v = input(p.v, at, token) + row;
    float value[Shape::kRows];
    COTTENTION_UNROLL
    for (int r = 0; r < Shape::kRows; ++r)
      value[r] = has_row(r) ? float(v[r * Shape::kGroups]) : 0.0f;
    COTTENTION_UNROLL
    for (int s = 0; s < kSums; ++s) sums[s] = 0.0f;
    COTTENTION_UNROLL
    for (int i = 0; i < Shape::kPieces; ++i) {
      if (column(i) >= p.key_width) break;
      const Quad key = load_input(input(p.k, at, token) + column(i), p.is_aligned);
      const Quad query = load_input(input(p.q, at, token) + column(i), p.is_aligned);
      COTTENTION_UNROLL
      for (int r = 0; r < Shape::kRows; ++r)
        sums[r] = moved(h[r][i], value[r], key, query, sums[r]);
      if (p.z) sums[Shape::kRows] = moved(z[i], 1.0f, key, query, sums[Shape::kRows]);
    }
  }

  // The token's outputs, from sums that are whole.
  COTTENTION_HD void write(const StepParams& p, const Place& at, int64_t token) {
    if (lane != 0) return;
    if (p.z) divide();
    Out* out = output(p, at, token) + row;
    COTTENTION_UNROLL
    for (int r = 0; r < Shape::kRows; ++r)
      if (has_row(r)) out[r * Shape::kGroups] = Out(sums[r]);
  }

  COTTENTION_HD void divide() {
    const float total = sums[Shape::kRows];
    const float below = total < kDenominatorFloor ? kDenominatorFloor : total;
    COTTENTION_UNROLL
    for (int r = 0; r < Shape::kRows; ++r) sums[r] /= below;
  }

  COTTENTION_HD void store(const StepParams& p) const {
    COTTENTION_UNROLL
    for (int r = 0; r < Shape::kRows; ++r)
      COTTENTION_UNROLL
      for (int i = 0; i < Shape::kPieces; ++i)
        if (has_row(r) && column(i) < p.key_width) store_state(piece(p, r, i), h[r][i]);
  }

  // Every group of lanes has the whole of z; one writes it, after all have read what stood there.
  COTTENTION_HD void store_z(const StepParams& p, const Place& at) const {
    COTTENTION_UNROLL
    for (int i = 0; i < Shape::kPieces; ++i)
      if (group == 0 && column(i) < p.key_width) store_state(z_piece(p, at, i), z[i]);
  }

  // Zeros for a segment without a slot.
  COTTENTION_HD void clear(const StepParams& p, const Place& at) const {
    const int end = least(at.tile_end * Shape::kTileRows, p.value_width);
    for (int64_t t = at.first; t < at.last; ++t)
      for (int i = at.tile * Shape::kTileRows + thread; i < end; i += kThreads)
        output(p, at, t)[i] = Out(0.0f);
  }
};

// What a block does. A Team is its threads: one on a GPU, all of them in turn on a host.
template <class Shape, bool kIsDecode, class Team>
COTTENTION_HD void run_block(const StepParams& p, uint32_t block, Team& team) {
  const Place at = place_of<Shape, kIsDecode>(p, block);
  if (!kIsDecode && at.first >= at.last) return;
  if (!at.is_live) return team.clear(p, at);
  for (int tile = at.tile; tile < at.tile_end; ++tile) {
    team.load(p, at, tile);
    for (int64_t t = at.first; t < at.last; ++t) {
      team.advance(p, at, t);
      team.fold();
      team.write(p, at, t);
    }
    team.store(p);
  }
  if (p.z) team.settle(p, at);
}

}  // namespace cottention::cuda
