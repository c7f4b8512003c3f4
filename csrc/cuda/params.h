// What the CUDA step is told: plain parameters between the checks and the kernel.
//
// Knows neither torch nor CUDA, so that every compiler reads it. All strides count elements.
#pragma once

#include <stdint.h>

namespace cottention::cuda {

enum class Type { kFloat, kBFloat16, kHalf };

// A view [N, H, D] with free strides but for the last, which is 1.
struct View {
  const void* data;
  int64_t token_stride, head_stride;
};

struct StepParams {
  View q, k, v;
  float* state;            // [S, H, V, K], [H, V, K] contiguous, rows 16-byte aligned
  float* z;                // [S, H, K], likewise; null: no denominator
  int64_t state_stride, z_stride;
  void* out;               // [N, H, V] in the type of v, tokens out_stride apart
  int64_t out_stride;
  const int32_t* slots;    // [B]; below 0 or at least num_slots: zeros, nothing touched
  const int32_t* offsets;  // [B + 1]; null: one token per slot
  int64_t tokens, segments;
  int heads, key_width, value_width, num_slots;
  bool is_aligned;         // four elements of q or k may be read at once
};

// What stands before the step: q, k and v mapped, and the MLP's gelu.
struct MapParams {
  View q, k, v;              // [N, H, D] of any type
  const int64_t* positions;  // [N], from 0
  const double* sigma;       // [H]
  const float *cos, *sin;    // [N, pairs]
  float *q_out, *k_out, *v_out;  // [N, H, D]
  const void* up;            // [N, inner], rows up_stride apart, in the type of q
  void* gelu;                // [N, inner], rows gelu_stride apart, likewise
  int64_t up_stride, gelu_stride, tokens;
  int heads, width, pairs, inner;
  bool is_aligned;           // four elements of up or gelu may be moved at once
};

// Enqueue the whole batch as one kernel. Return what CUDA has to say, null if nothing.
const char* launch_step(const StepParams& params, Type in, Type out, void* stream);
const char* launch_map(const MapParams& params, Type type, void* stream);

}  // namespace cottention::cuda
