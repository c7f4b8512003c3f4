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
  int64_t tokens, segments;
  int heads, key_width, value_width, num_slots;
  Decay decay;
  bool has_term;          // (S a) bᵀ
  bool is_aligned;        // q and k can be read four elements at a time
  bool is_terms_aligned;  // likewise w, a and b
  bool is_general() const { return has_term || decay != Decay::kNone; }
};

// Before the step: the feature map of q, k and v, and the MLP's gelu.
struct FeaturesGeluParams {
  View q, k, v;                  // [N, H, D] of any type
  const int64_t* positions;      // [N], counted from 0
  const double* sigma;           // [H]
  const float *cos, *sin;        // [N, pairs]
  float *q_out, *k_out, *v_out;  // [N, H, D]
  const void* up;                // [N, inner], rows up_stride apart, in the type of q
  void* gelu;                    // [N, inner], rows gelu_stride apart, likewise
  int64_t up_stride, gelu_stride, tokens;
  int heads, width, pairs, inner;
  bool is_aligned;  // up and gelu can be accessed four elements at a time
};

// Enqueue the whole batch as one kernel. Return an error message, or null.
const char* launch_step(const StepParams& params, Type in, Type out, void* stream);
const char* launch_features_gelu(const FeaturesGeluParams& params, Type type, void* stream);

}  // namespace cottention::cuda
