// Parameter structs of the kernels, and the table of kernels of one instruction set. No torch here.
//
// Strides count elements; data is float32 unless noted. A kernel computes one task. Tasks are
// independent: no sum crosses from one task to another, so the result does not depend on threads.
// Members are always inlined, so that no copy compiled for one instruction set is linked into
// another.
#pragma once

#include <stdint.h>

namespace cottention {

constexpr int64_t kPanel = 64;     // output columns per panel of a packed weight
constexpr int64_t kTaskRows = 48;  // maximum rows of x per task of the product
constexpr int64_t kMaxKeyWidth = 512;
constexpr int64_t kMaxValueWidth = 256;
constexpr float kDenominatorFloor = 1e-6f;
constexpr float kNormFloor = 1e-12f;
constexpr int32_t kPaddingSlot = -1;

// A view [N, H, D] whose last stride is 1; `data` is that of token `first_token`.
struct HeadView {
  const float* data;
  int64_t token_stride, head_stride;
  int64_t first_token = 0;
  [[gnu::always_inline]] const float* at(int64_t token, int64_t head) const {
    return data + (token - first_token) * token_stride + head * head_stride;
  }
};

struct RecurrentParams {
  HeadView q, k, v;
  float* state;  // [S, H, V, K], [H, V, K] contiguous
  float* z;      // [S, H, K], [H, K] contiguous; null: no denominator
  int64_t state_stride, z_stride;
  float* out;  // [N, H, V], tokens out_stride apart
  int64_t out_stride;
  float* denominators;           // [N, H], clamped to kDenominatorFloor; null without z
  const int32_t* state_indices;  // [B], rows of state and z; kPaddingSlot: outputs are zero
  const int32_t* cu_seqlens;     // [B + 1]; null: one token per segment
  int64_t segments, heads, key_width, value_width;
  int64_t rows_per_split;  // value rows per task, a multiple of 8

  [[gnu::always_inline]] int64_t row_splits() const {
    return (value_width + rows_per_split - 1) / rows_per_split;
  }
  [[gnu::always_inline]] int64_t tasks() const { return segments * heads * row_splits(); }
  [[gnu::always_inline]] int64_t first(int64_t segment) const {
    return cu_seqlens ? cu_seqlens[segment] : segment;
  }
  [[gnu::always_inline]] float* out_at(int64_t token, int64_t head) const {
    return out + token * out_stride + head * value_width;
  }
};

struct LinearParams {
  const float* x;       // 32-bit words [rows, words], rows x_stride words apart
  const float* packed;  // [ceil(columns / kPanel), words, kPanel]
  const float* bias;    // [columns] or null
  float* out;           // [rows, columns]
  int64_t rows, words, columns, x_stride;
  bool adds;  // add to out in place of overwriting it

  [[gnu::always_inline]] int64_t panels() const { return (columns + kPanel - 1) / kPanel; }
  [[gnu::always_inline]] int64_t blocks() const { return (rows + kTaskRows - 1) / kTaskRows; }
};

struct ToBFloat16Params {
  const float* x;  // [rows, channels], rows x_stride apart
  float* words;    // two bfloat16 channels each, rows words_stride apart
  int64_t channels, x_stride, words_stride;
};

struct FeatureParams {
  HeadView q, k, v;
  const int64_t* positions;      // [N], counted from 0
  const double* sigma;           // [H]
  const float *cos, *sin;        // [N, pairs]
  float *q_out, *k_out, *v_out;  // [N, H, D]; unused by attention_gelu
  int64_t heads, width, pairs;
};

struct RowsParams {
  const float* x;  // [rows, columns], rows x_stride apart
  float* out;      // [rows, columns], rows out_stride apart
  int64_t columns, x_stride, out_stride;
};

// Between the two products of a block: the recurrence on mapped q, k, v, and the MLP's gelu.
struct AttentionGeluParams {
  FeatureParams features;
  RecurrentParams recurrent;  // without q, k, v
  RowsParams gelu;            // rows are tokens
};

struct NormParams {
  const float *x, *weight, *bias;  // [rows, columns], [columns], [columns]
  float* out;                      // [rows, columns]
  int64_t columns, x_stride;
  float epsilon;
};

struct ArgmaxParams {
  const float* x;  // [rows, columns], rows x_stride apart
  int64_t* out;    // [rows]
  int64_t columns, x_stride;
};

struct SamplingWeightsParams {
  const float* x;  // [columns]
  float* out;      // [columns]
  int64_t columns;
  float max_logit;  // the largest of x, finite
  float temperature, min_p;
};

// One instruction set; the comments give the number of tasks.
struct Kernels {
  void (*denominators)(const RecurrentParams&, int64_t task);  // segments × heads
  void (*recurrent)(const RecurrentParams&, int64_t task);     // segments × heads × row splits
  void (*attention_gelu)(const AttentionGeluParams&, int64_t task);  // as recurrent
  void (*linear)(const LinearParams&, int64_t task);                 // panels × blocks of rows
  void (*linear_bfloat16)(const LinearParams&, int64_t task);  // as linear, weights in bfloat16
  void (*to_bfloat16)(const ToBFloat16Params&, int64_t row);
  void (*features)(const FeatureParams&, int64_t token);
  void (*gelu)(const RowsParams&, int64_t row);
  void (*gelu_erf)(const RowsParams&, int64_t row);
  void (*elu_plus_one)(const RowsParams&, int64_t row);
  void (*layer_norm)(const NormParams&, int64_t row);
  void (*argmax)(const ArgmaxParams&, int64_t row);
  void (*sampling_weights)(const SamplingWeightsParams&);
};

namespace plain {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}

// The best table that this machine supports, or the one that COTTENTION_CPU_ISA names.
const Kernels& kernels();

}  // namespace cottention
