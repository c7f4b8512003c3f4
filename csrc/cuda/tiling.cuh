// How blocks of threads lie on the state: by the width of the keys, a head or a part of it each.
#pragma once

#include "memory.cuh"
#include "params.h"

namespace cottention::cuda {

constexpr int kInFlight = 4;   // sixteen-byte pieces of state that a thread asks for at once

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

// Calls visit(Shape<…>{}) with the shape for a key width of 8 to 512. Below 32 lanes stand idle.
template <class Visit>
void with_shape(int key_width, const Visit& visit) {
  const int quads = key_width / 4;
  if (quads <= 8) return visit(Shape<8, 1>{});
  if (quads <= 16) return visit(Shape<16, 1>{});
  if (quads <= 32) return visit(Shape<32, 1>{});
  if (quads <= 64) return visit(Shape<32, 2>{});
  return visit(Shape<32, 4>{});
}

}  // namespace cottention::cuda
