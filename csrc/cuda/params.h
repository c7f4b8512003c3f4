// Parameter structs of the CUDA kernels. Neither torch nor CUDA here, so that every compiler reads
// it. Strides count elements.
#pragma once

#include <stdint.h>

#include "../kernels.h"

namespace cottention::cuda {

enum class Type { kFloat, kBFloat16, kHalf };

// A view [N, H, D] whose last stride is 1.
struct View {
  const void* data;
  int64_t token_stride, head_stride;
};

// A part of a segment: tokens [begin, end). Its segment has the pieces first_piece to last_piece, in
// token order; a segment that is not cut has one. Pieces of cut segments come before all others.
struct Piece {
  int32_t slot, begin, end, first_piece, last_piece;
};

// What steps have added to the states of a pool and not yet written there: up to `capacity` pairs
// of a mapped key and value for each slot. With them, the state is S + Σ value keyᵀ.
struct DelayedUpdates {
  float* keys;    // [S, capacity, H, K], [H, K] contiguous; null: every step writes the state
  float* values;  // [S, capacity, H, V], likewise
  int64_t key_stride, key_slot_stride, value_stride, value_slot_stride;
  const int32_t* counts;  // [S or more]: pairs of each slot
  int capacity;
};

struct StepParams {
  View q, k, v;
  View w, a, b;  // float32: w [N, H, 1] or [N, H, K] by `decay`, a and b [N, H, K] by `has_term`
  float* state;  // [S, H, V, K], [H, V, K] contiguous, rows 16-byte aligned
  float* z;      // [S, H, K], likewise; null: no denominator
  int64_t state_stride, z_stride;
  void* out;  // [N, H, V] in the type of v, tokens out_stride apart
  int64_t out_stride;
  const int32_t* state_indices;  // [B]; outside [0, num_slots): outputs are zero, no row changes
  const int32_t* cu_seqlens;     // [B + 1]; null: one token per segment
  const Piece* pieces;  // in place of both, one for each of `segments`; null: there are none
  float* cut_state;     // [pieces of cut segments, H, V, K]: states between the passes over pieces
  float* cut_z;         // [likewise, H, K]
  DelayedUpdates delayed;
  int64_t tokens, segments;
  int heads, key_width, value_width, num_slots;
  Decay decay;
  bool has_term;          // (S a) bᵀ
  bool is_aligned;        // q and k can be read four elements at a time
  bool is_terms_aligned;  // likewise w, a and b
  bool is_general() const { return has_term || decay != Decay::kNone; }
};

// The feature map of q, k and v, and the MLP's gelu.
struct FeaturesGeluParams {
  View q, k, v;                  // [N, H, D] of any type
  const int64_t* positions;      // [N], counted from 0
  const double* sigma;           // [H]
  const float *cos, *sin;        // [N, pairs]
  float *q_out, *k_out, *v_out;  // [N, H, D]; unused where the step follows in the same kernel
  const void* up;                // [N, inner], rows up_stride apart, in the type of q
  void* gelu;                    // [N, inner], rows gelu_stride apart, likewise
  int64_t up_stride, gelu_stride, tokens;
  int heads, width, pairs, inner;
  bool is_aligned;         // up and gelu can be accessed four elements at a time
  bool is_inputs_aligned;  // likewise q and k
};

// The feature maps besides Cottention's.
enum class Map { kLinear, kCosFormer, kPerformer, kFourier };

// One of them, and the MLP's gelu; without positions and sigma. Features are float32.
struct MapParams : FeaturesGeluParams {
  Map map;
  const float* table;         // [N, 2], what cosFormer multiplies by; else null
  const float* projection;    // [features, D] per head, rows 16-byte aligned; null: `features` is 0
  int64_t projection_stride;  // from head to head, 0 where all share one
  const float* normed;        // [N, channels], what the gate is computed from; null: no gate
  const float* gate_weight;   // [H, channels]
  const float* gate_bias;     // [H]
  float* gate_out;            // [N, H]
  int features, channels, key_width, value_width;
};

// out ← mixed / ±max(|total|, floor), where `total` follows the values of each head in mixed.
struct DivideParams {
  const float* mixed;  // [N, H, value_width]
  void* out;           // [N, H, width] of any type, tokens out_stride apart
  int64_t tokens, out_stride;
  int heads, width, value_width;
  float floor;
};

// x ← x + y, out ← (x − mean) / √(variance + ε) · weight + bias, along rows.
struct AddLayerNormParams {
  float* x;       // [rows, columns], contiguous as all here
  const void* y;  // likewise, of any type; null: nothing is added
  void* out;      // likewise, of any type
  const float *weight, *bias;
  int64_t rows;
  int columns;
  float epsilon;
  bool is_aligned;  // y and out can be accessed four elements at a time, columns % 4 == 0
};

// Passes over pieces, in this order. The second is needed where segments are cut.
enum class Pass { kFirst, kLater };

// Each enqueues one kernel for the whole batch. Returns an error message, or null.
//
// launch_step: q, k, v and out are of one type. launch_pieces: `is_after_map`: q, k and v come from
// the kernel that was enqueued right before. launch_attention_gelu: map, step and gelu, one token
// for each segment; with delayed updates it adds one, and writes the state when they are complete.
const char* launch_step(const StepParams& params, Type type, void* stream);
const char* launch_pieces(const StepParams& params, Type in, Type out, Pass pass, bool is_after_map,
                          void* stream);
const char* launch_features_gelu(const FeaturesGeluParams& params, Type type, void* stream);
const char* launch_attention_gelu(const StepParams& step, const FeaturesGeluParams& map, Type type,
                                  void* stream);
const char* launch_map_gelu(const MapParams& params, Type type, void* stream);
const char* launch_divide(const DivideParams& params, Type out, void* stream);
// launch_fold: adds the delayed updates of the slots in state_indices to their states.
const char* launch_fold(const StepParams& params, void* stream);
const char* launch_add_layer_norm(const AddLayerNormParams& params, Type y, Type out, void* stream);

}  // namespace cottention::cuda
