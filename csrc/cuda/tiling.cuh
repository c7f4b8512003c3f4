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

// What the segments of a batch are, and with pieces which pass over them.
enum class Form { kDecode, kSegments, kFirstPieces, kLaterPieces };

// Blocks that must fit on a multiprocessor at once: with more, registers would be spilled.
template <class TileShape>
constexpr int min_blocks(Form form, bool is_general) {
  if (form == Form::kFirstPieces || form == Form::kLaterPieces)
    return TileShape::kPieces == 1 ? 4 : 3;
  const bool is_small = form == Form::kDecode && !is_general;
  if (TileShape::kPieces == 1) return is_small ? 8 : 5;
  return TileShape::kPieces == 2 && is_small ? 6 : 4;
}

// The work of a block: a head of a slot, tokens [first, last), tiles [tile, tile_end).
struct BlockTask {
  int head, slot, tile, tile_end;
  int64_t first, last;
  bool is_active;
  int piece, first_piece, last_piece;
  COTTENTION_HD bool is_first_piece() const { return piece == first_piece; }
  COTTENTION_HD bool is_last_piece() const { return piece == last_piece; }
};

template <class TileShape, Form kForm>
COTTENTION_HD BlockTask block_task(const StepParams& p, uint32_t block) {
  const uint32_t tiles = num_tiles<TileShape>(p), tile_groups = p.z ? 1 : tiles;
  const uint32_t segment = block / tile_groups / p.heads;
  BlockTask task{};
  task.head = block / tile_groups % p.heads;
  task.tile = block % tile_groups;
  task.tile_end = p.z ? tiles : task.tile + 1;
  if constexpr (kForm == Form::kDecode) {
    task.slot = p.state_indices[segment];
    task.first = segment;
    task.last = task.first + 1;
  } else if constexpr (kForm == Form::kSegments) {
    task.slot = p.state_indices[segment];
    task.first = p.cu_seqlens[segment] < 0 ? 0 : p.cu_seqlens[segment];
    task.last = min(p.cu_seqlens[segment + 1], p.tokens);
  } else {
    const Piece piece = p.pieces[segment];
    task.slot = piece.slot;
    task.first = piece.begin < 0 ? 0 : piece.begin;
    task.last = min(piece.end, p.tokens);
    task.piece = segment;
    task.first_piece = piece.first_piece;
    task.last_piece = piece.last_piece;
    // The last of several has no part in the first pass, the first none in the second.
    const bool is_other = kForm == Form::kFirstPieces
                              ? task.is_last_piece() && !task.is_first_piece()
                              : task.is_first_piece();
    if (is_other) task.last = task.first;
  }
  task.is_active = task.slot >= 0 && task.slot < p.num_slots;
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

inline int64_t num_blocks_of(const StepParams& p) {
  int64_t blocks = 0;
  with_tile_shape(p.key_width, [&](auto shape) { blocks = num_blocks<decltype(shape)>(p); });
  return blocks;
}

}  // namespace cottention::cuda
