// Which part of the state a block of threads works on, by the width of the keys.
#pragma once

#include "memory.cuh"
#include "params.h"

namespace cottention::cuda {

constexpr int kLoadsInFlight = 4;  // 16-byte loads of state that a thread issues at once

// The tile of a block: kLanes lanes along the keys of a row, each with kPieces quads of the row.
template <int kLanes_, int kPieces_>
struct TileShape {
  static constexpr int kLanes = kLanes_, kPieces = kPieces_;
  static constexpr int kRows = kLoadsInFlight / kPieces;  // per group of lanes
  static constexpr int kGroups = kThreads / kLanes;
  static constexpr int kTileRows = kGroups * kRows;  // value rows per block
};

template <class TileShape>
COTTENTION_HD int num_tiles(const StepParams& p) {
  return (p.value_width + TileShape::kTileRows - 1) / TileShape::kTileRows;
}

// With a denominator one block computes all tiles of a head, because z must be updated once only.
template <class TileShape>
COTTENTION_HD int64_t num_blocks(const StepParams& p) {
  return p.segments * p.heads * (p.z ? 1 : num_tiles<TileShape>(p));
}

// The work of a block: a head of a slot, tokens [first, last), tiles [tile, tile_end).
struct BlockTask {
  int head, slot, tile, tile_end;
  int64_t first, last;
  bool is_active;
};

// kIsDecode: no cu_seqlens, every segment has one token.
template <class TileShape, bool kIsDecode>
COTTENTION_HD BlockTask block_task(const StepParams& p, uint32_t block) {
  const uint32_t tiles = num_tiles<TileShape>(p), tile_groups = p.z ? 1 : tiles;
  const uint32_t segment = block / tile_groups / p.heads;
  BlockTask task;
  task.head = block / tile_groups % p.heads;
  task.tile = block % tile_groups;
  task.tile_end = p.z ? tiles : task.tile + 1;
  task.slot = p.state_indices[segment];
  task.is_active = task.slot >= 0 && task.slot < p.num_slots;
  if (kIsDecode) {
    task.first = segment;
    task.last = task.first + 1;
  } else {
    task.first = p.cu_seqlens[segment] < 0 ? 0 : p.cu_seqlens[segment];
    task.last = min(p.cu_seqlens[segment + 1], p.tokens);
  }
  return task;
}

// Calls visit(TileShape<…>{}) for a key width of 8 to 512. Widths below 32 leave lanes idle.
template <class Visit>
void with_tile_shape(int key_width, const Visit& visit) {
  const int quads = key_width / 4;
  if (quads <= 8) return visit(TileShape<8, 1>{});
  if (quads <= 16) return visit(TileShape<16, 1>{});
  if (quads <= 32) return visit(TileShape<32, 1>{});
  if (quads <= 64) return visit(TileShape<32, 2>{});
  return visit(TileShape<32, 4>{});
}

}  // namespace cottention::cuda
