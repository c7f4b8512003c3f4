// What the kernels are told: plain parameter structs between the checks and the arithmetic.
//
// Owns the structs and the table of functions of one instruction set. Knows no torch. All strides
// are counted in elements; all data is float32 unless said. A kernel does one task of many and
// never asks which thread it is on: tasks are independent, and no sum crosses from one to another.
// Members are always inlined, so that no copy compiled for one instruction set serves another.
#pragma once

#include <stdint.h>

namespace cottention {

constexpr int64_t kPanel = 64;         // output columns that a packed weight holds side by side
constexpr int64_t kTaskRows = 48;      // most rows of x per task of the product
constexpr int64_t kMaxKeyWidth = 512;
constexpr int64_t kMaxValueWidth = 256;
constexpr float kDenominatorFloor = 1e-6f;
constexpr float kNormFloor = 1e-12f;
constexpr int32_t kPaddingSlot = -1;

// A view [N, H, D] with free strides but for the last, which is 1; data may begin at a later token.
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
  float* state;                // [S, H, V, K], [H, V, K] contiguous
  float* z;                    // [S, H, K], [H, K] contiguous; null: no denominator
  int64_t state_stride, z_stride;
  float* out;                  // [N, H, V], tokens out_stride apart
  int64_t out_stride;
  float* denominators;         // [N, H], already held above the floor; null without z
  const int32_t* slots;        // [B]
  const int32_t* offsets;      // [B + 1]; null: one token per slot
  int64_t segments, heads, key_width, value_width;
  int64_t share_rows;          // value rows per task, a multiple of 8

  [[gnu::always_inline]] int64_t shares() const {
    return (value_width + share_rows - 1) / share_rows;
  }
  [[gnu::always_inline]] int64_t tasks() const { return segments * heads * shares(); }
  [[gnu::always_inline]] int64_t first(int64_t segment) const {
    return offsets ? offsets[segment] : segment;
  }
  [[gnu::always_inline]] float* out_at(int64_t token, int64_t head) const {
    return out + token * out_stride + head * value_width;
  }
};

struct LinearParams {
  const float* x;              // words of 32 bits [rows, words], rows x_stride words apart
  const float* packed;         // [ceil(columns / kPanel), words, kPanel]
  const float* bias;           // [columns] or null
  float* out;                  // [rows, columns]
  int64_t rows, words, columns, x_stride;
  bool adds;                    // to what is in out

  [[gnu::always_inline]] int64_t panels() const { return (columns + kPanel - 1) / kPanel; }
  [[gnu::always_inline]] int64_t blocks() const { return (rows + kTaskRows - 1) / kTaskRows; }
};

struct RoundParams {
  const float* x;              // [rows, channels], rows x_stride apart
  float* words;                // two channels each in bfloat16, rows words_stride apart
  int64_t channels, x_stride, words_stride;
};

struct FeatureParams {
  HeadView q, k, v;
  const int64_t* positions;    // [N], from 0
  const double* sigma;         // [H]
  const float *cos, *sin;      // [N, pairs]
  float *q_out, *k_out, *v_out;  // [N, H, D]; not for the mixer
  int64_t heads, width, pairs;
};

struct RowsParams {
  const float* x;              // [rows, columns], rows x_stride apart
  float* out;                  // [rows, columns], rows out_stride apart
  int64_t columns, x_stride, out_stride;
};

// What stands between a layer's two products: the recurrence on mapped q, k, v, and the MLP's gelu.
struct MixParams {
  FeatureParams features;
  RecurrentParams recurrent;   // without q, k, v
  RowsParams gelu;             // rows are tokens
};

struct NormParams {
  const float *x, *weight, *bias;  // [rows, columns], [columns], [columns]
  float* out;                  // [rows, columns]
  int64_t columns, x_stride;
  float epsilon;
};

struct LikeliestParams {
  const float* x;              // [rows, columns], rows x_stride apart
  int64_t* out;                // [rows]
  int64_t columns, x_stride;
};

struct WeighParams {
  const float* x;              // [columns]
  float* out;                  // [columns]
  int64_t columns;
  float best;                  // the largest of x, finite
  float temperature, least;
};

struct Kernels {
  void (*denominators)(const RecurrentParams&, int64_t task);  // tasks: segments × heads
  void (*recurrent)(const RecurrentParams&, int64_t task);     // tasks: segments × heads × shares
  void (*mix)(const MixParams&, int64_t task);                 // tasks: as recurrent
  void (*linear)(const LinearParams&, int64_t task);           // tasks: panels × blocks of rows
  void (*linear_pairs)(const LinearParams&, int64_t task);     // the same, weights in bfloat16
  void (*round_row)(const RoundParams&, int64_t row);          // float32 to such words
  void (*features)(const FeatureParams&, int64_t token);
  void (*gelu)(const RowsParams&, int64_t row);
  void (*elu_plus_one)(const RowsParams&, int64_t row);
  void (*layer_norm)(const NormParams&, int64_t row);
  void (*likeliest)(const LikeliestParams&, int64_t row);
  void (*weigh)(const WeighParams&);
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

// The best table that this machine runs, or the one that COTTENTION_CPU_ISA names.
const Kernels& kernels();

}  // namespace cottention
