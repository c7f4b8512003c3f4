// The recurrence as one CUDA thread sees it: state += v ⊗ k, out = state q, token after token.
//
// A group of lanes lies along the keys of a value row, sixteen bytes a lane, and holds several rows
// in registers, so that a row of state is read once and written once whatever the segment's
// length. A row's sum runs over its lane's own elements first and then over the lanes, pairwise,
// at distances that halve: one order whatever the batch. Owns all arithmetic; what only a GPU can
// do (shuffle, barrier) is asked of a `Team`, which a host build replaces by loops.
#pragma once

#include <math.h>
#include <stdint.h>

#include "../kernels.h"
#include "params.h"

#ifdef __CUDACC__
#define COTTENTION_HD __host__ __device__ __forceinline__
#define COTTENTION_UNROLL _Pragma("unroll")
#else
#define COTTENTION_HD inline
#define COTTENTION_UNROLL
#endif

namespace cottention::cuda {

constexpr int kThreads = 128;  // per block
constexpr int kInFlight = 4;   // sixteen-byte pieces of state that a thread asks for at once

COTTENTION_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct alignas(16) Quad {
  float x[4];
};

// How a block lies on the state: kLanes lanes along a row's keys, each with kPieces quads of it.
template <int kLanes_, int kPieces_>
struct Shape {
  static constexpr int kLanes = kLanes_, kPieces = kPieces_;
  static constexpr int kRows = kInFlight / kPieces;  // of one group of lanes
  static constexpr int kGroups = kThreads / kLanes;
  static constexpr int kTileRows = kGroups * kRows;  // value rows of a block
};

template <class Shape>
COTTENTION_HD int num_tiles(const StepParams& p) {
  return (p.value_width + Shape::kTileRows - 1) / Shape::kTileRows;
}

// With a denominator one block does all tiles of a head, because z may change once only.
template <class Shape>
COTTENTION_HD int64_t num_blocks(const StepParams& p) {
  return p.segments * p.heads * (p.z ? 1 : num_tiles<Shape>(p));
}

// What a block works on: a head of a slot, tokens [first, last), tiles [tile, tile_end).
struct Place {
  int head, slot, tile, tile_end;
  int64_t first, last;
  bool is_live;
};

// kIsDecode: there are no offsets, every segment is one token.
template <class Shape, bool kIsDecode>
COTTENTION_HD Place place_of(const StepParams& p, uint32_t block) {
  const uint32_t tiles = num_tiles<Shape>(p), shares = p.z ? 1 : tiles;
  const uint32_t segment = block / shares / p.heads;
  Place at;
  at.head = block / shares % p.heads;
  at.tile = block % shares;
  at.tile_end = p.z ? tiles : at.tile + 1;
  at.slot = p.slots[segment];
  at.is_live = at.slot >= 0 && at.slot < p.num_slots;
  if (kIsDecode) {
    at.first = segment;
    at.last = at.first + 1;
  } else {
    at.first = p.offsets[segment] < 0 ? 0 : p.offsets[segment];
    at.last = least(p.offsets[segment + 1], p.tokens);
  }
  return at;
}

// State passes through once: it must not drive the weights out of the cache.
COTTENTION_HD Quad load_state(const float* from) {
#ifdef __CUDA_ARCH__
  const float4 four = __ldcs(reinterpret_cast<const float4*>(from));
  return {{four.x, four.y, four.z, four.w}};
#else
  return *reinterpret_cast<const Quad*>(from);
#endif
}

COTTENTION_HD void store_state(float* to, const Quad& quad) {
#ifdef __CUDA_ARCH__
  __stcs(reinterpret_cast<float4*>(to), make_float4(quad.x[0], quad.x[1], quad.x[2], quad.x[3]));
#else
  *reinterpret_cast<Quad*>(to) = quad;
#endif
}

template <class T>
COTTENTION_HD Quad load_input(const T* from, bool is_aligned) {
  struct alignas(4 * sizeof(T)) Four {
    T x[4];
  } four;
  if (is_aligned) {
    four = *reinterpret_cast<const Four*>(from);
  } else {
    COTTENTION_UNROLL
    for (int i = 0; i < 4; ++i) four.x[i] = from[i];
  }
  return {{float(four.x[0]), float(four.x[1]), float(four.x[2]), float(four.x[3])}};
}

// row += value · key; returns total + row · query.
COTTENTION_HD float moved(Quad& row, float value, const Quad& key, const Quad& query, float total) {
  COTTENTION_UNROLL
  for (int i = 0; i < 4; ++i) {
    row.x[i] = fmaf(value, key.x[i], row.x[i]);
    total = fmaf(row.x[i], query.x[i], total);
  }
  return total;
}

// One thread of a block; T is the type of q, k, v and the outputs.
template <class T, class Shape>
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
  COTTENTION_HD static T* output(const StepParams& p, const Place& at, int64_t token) {
    return static_cast<T*>(p.out) + token * p.out_stride + at.head * p.value_width;
  }
  COTTENTION_HD static const T* input(const View& x, const Place& at, int64_t token) {
    return static_cast<const T*>(x.data) + token * x.token_stride + at.head * x.head_stride;
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
    const T* v = input(p.v, at, token) + row;
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
      for (int r = 0; r < Shape::kRows; ++r) sums[r] = moved(h[r][i], value[r], key, query, sums[r]);
      if (p.z) sums[Shape::kRows] = moved(z[i], 1.0f, key, query, sums[Shape::kRows]);
    }
  }

  // The token's outputs, from sums that are whole.
  COTTENTION_HD void write(const StepParams& p, const Place& at, int64_t token) {
    if (lane != 0) return;
    if (p.z) divide();
    T* out = output(p, at, token) + row;
    COTTENTION_UNROLL
    for (int r = 0; r < Shape::kRows; ++r)
      if (has_row(r)) out[r * Shape::kGroups] = T(sums[r]);
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
        output(p, at, t)[i] = T(0.0f);
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

// Calls visit(Shape<…>{}) with the shape for a key width of 8 to 512.
template <class Visit>
void with_shape(int key_width, const Visit& visit) {
  const int quads = key_width / 4;
  if (quads <= 2) return visit(Shape<2, 1>{});
  if (quads <= 4) return visit(Shape<4, 1>{});
  if (quads <= 8) return visit(Shape<8, 1>{});
  if (quads <= 16) return visit(Shape<16, 1>{});
  if (quads <= 32) return visit(Shape<32, 1>{});
  if (quads <= 64) return visit(Shape<32, 2>{});
  return visit(Shape<32, 4>{});
}

}  // namespace cottention::cuda
