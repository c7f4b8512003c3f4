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
constexpr int64_t kCompressedTaskRows = 128;  // the same with compressed weights
constexpr int64_t kGroup = 64;     // channels with one scale, of weights of eight bits
constexpr int64_t kGroupWords = 1 + kGroup / 4;  // 32-bit words of a group: its scale, its weights
constexpr int64_t kHalfPanel = 64;  // bytes: two channels of half of a panel's columns
constexpr int64_t kCompressedWord = 3 * kHalfPanel;  // bytes of a word of a compressed panel
constexpr int64_t kMaxKeyWidth = 512;
constexpr int64_t kMaxFusedWidth = 256;  // of a head in attention_gelu
constexpr int64_t kScanChannels = 128;   // per task of the selective scan
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

// w of a recurrent step: 1, one number per head, or one per key.
enum class Decay { kNone, kPerHead, kPerKey };

struct RecurrentParams {
  HeadView q, k, v;
  Decay decay;
  HeadView w;     // [N, H, 1] or [N, H, K]
  bool has_term;  // (S a) bᵀ
  HeadView a, b;  // [N, H, K]
  float* state;  // [S, H, V, K], [H, V, K] contiguous
  float* z;      // [S, H, K], [H, K] contiguous; null: no denominator
  int64_t state_stride, z_stride;
  float* out;  // [N, H, V], tokens out_stride apart
  int64_t out_stride;
  float* denominators;           // [N, H], clamped to kDenominatorFloor; null without z
  const int32_t* state_indices;  // [B], rows of state and z; kPaddingSlot: outputs are zero
  const int32_t* cu_seqlens;     // [B + 1]; null: one token per segment
  const int32_t* order;          // [B], the segments as the tasks take them; null: as they are
  int64_t segments, heads, key_width, value_width;
  int64_t row_splits, rows_per_split;  // tasks per head, and their value rows, a multiple of 8
  bool prefetches;                     // prefetches_ahead()

  [[gnu::always_inline]] int64_t tasks() const { return segments * heads * row_splits; }
  [[gnu::always_inline]] int64_t first(int64_t segment) const {
    return cu_seqlens ? cu_seqlens[segment] : segment;
  }
  [[gnu::always_inline]] float* out_at(int64_t token, int64_t head) const {
    return out + token * out_stride + head * value_width;
  }
};

// What a panel of compressed weights begins with; then come its exceptions, in order, the last with
// kNoWord, and its words (compressed.h).
struct CompressedHeader {
  uint8_t table[16];   // the upper byte that each code stands for
  uint32_t capacity;   // exceptions that there is room for
  uint32_t unused[11];
};
struct CompressedException {
  uint32_t word;
  uint16_t place, value;  // of the 2 kPanel weights of a word; bits of bfloat16
};
constexpr uint32_t kNoWord = UINT32_MAX;
constexpr int64_t compressed_bytes(int64_t words, int64_t capacity) {
  const int64_t exceptions = capacity * sizeof(CompressedException);
  return sizeof(CompressedHeader) + exceptions + words * kCompressedWord;
}

struct LinearParams {
  const float* x;       // 32-bit words, rows x_stride words apart; for one word of `packed` each kernel
                        // takes as many as its type of weights says
  const float* packed;  // [ceil(columns / kPanel), words, kPanel], or compressed panels
  const float* bias;    // [columns] or null
  float* out;           // [rows, columns]
  int64_t rows, words, columns, x_stride;
  int64_t panel_stride;  // words from panel to panel
  int64_t task_rows;     // at most
  bool adds;        // add to out in place of overwriting it
  bool prefetches;  // prefetches_ahead()

  [[gnu::always_inline]] int64_t panels() const { return (columns + kPanel - 1) / kPanel; }
  [[gnu::always_inline]] int64_t blocks() const { return (rows + task_rows - 1) / task_rows; }
};

// From a row of x to what the product takes: bfloat16, or eight bits.
struct ConvertRowParams {
  const float* x;  // [rows, channels], rows x_stride apart
  float* words;    // rows words_stride apart
  int64_t channels, x_stride, words_stride;
};

struct QuantizeParams {
  const float* weight;  // [columns, channels], rows stride apart
  float* packed;        // [ceil(columns / kPanel), ceil(channels / kGroup) * kGroupWords, kPanel]
  int64_t columns, channels, stride;
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

struct RMSNormParams {
  const float *x, *weight;  // [rows, columns], rows x_stride apart; [columns]
  float* out;               // [rows, columns]
  int64_t columns, x_stride, groups;
  float epsilon;
};

constexpr int64_t kConvolutionChannels = 512;  // channels per task

struct ShortConvolutionParams {
  const float *x, *weight, *bias;  // [N, channels], rows x_stride apart; [width, channels]; or null
  float* tails;                    // [S, width - 1, channels], slots tail_stride apart
  float* out;                      // [N, channels]
  const int32_t *state_indices, *cu_seqlens;  // as in RecurrentParams
  int64_t x_stride, tail_stride, channels, width;

  [[gnu::always_inline]] int64_t splits() const {
    return (channels + kConvolutionChannels - 1) / kConvolutionChannels;
  }
  [[gnu::always_inline]] int64_t first(int64_t segment) const {
    return cu_seqlens ? cu_seqlens[segment] : segment;
  }
};

struct SelectiveScanParams {
  const float *u, *delta;     // [N, channels], rows u_stride and delta_stride apart
  const float* log_decay;     // [channels, width]
  const float *k, *q;         // [N, width], rows k_stride and q_stride apart
  float* state;               // [S, channels, width], slots state_stride apart
  float* out;                 // [N, channels]
  const int32_t *state_indices, *cu_seqlens;  // as in RecurrentParams
  int64_t u_stride, delta_stride, k_stride, q_stride, state_stride, channels, width;

  [[gnu::always_inline]] int64_t splits() const {
    return (channels + kScanChannels - 1) / kScanChannels;
  }
  [[gnu::always_inline]] int64_t first(int64_t segment) const {
    return cu_seqlens ? cu_seqlens[segment] : segment;
  }
};

struct TokenMixParams {
  const float* y;              // [N, channels]
  const float* const* before;  // [N], the rows before
  const float* mix;            // [mixes, channels]
  float* out;                  // mixes of [N, channels], mix_stride apart
  int64_t channels, mixes, mix_stride;
};

// All that happens in the heads of an RWKV-7 block, on [N, H, K] contiguous; w, a, k, v (in all
// but the first layer) and b are overwritten.
struct RWKV7HeadsParams {
  RecurrentParams recurrent;  // of r, k, v, w, a and b, with all rows of a head in one task
  float *r, *k, *v, *w, *a, *b;
  const float *g, *v_first, *v_mix;  // v_mix is null in the first layer
  const float *k_k, *k_a, *r_k, *norm_weight, *norm_bias;  // [H, K]
  float unit_weight, norm_epsilon;
};

// All that happens in the heads of a Mamba-2 block.
struct Mamba2HeadsParams {
  RecurrentParams recurrent;  // k and q of the first group, the same for all heads
  const float *gate, *step;   // [N, H V] and [N, H], rows joined_stride apart
  const float* x;             // [N, H V], rows x_stride apart
  float *v, *w;               // [N, H, V] and [N, H]; overwritten
  const float *step_bias, *log_decay, *skip;  // [H]
  int64_t joined_stride, x_stride, groups;
  float least_step, greatest_step;
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
  void (*linear_bfloat16)(const LinearParams&, int64_t task);  // as linear, all in bfloat16
  void (*linear_widened)(const LinearParams&, int64_t task);   // as linear, weights in bfloat16
  void (*linear_compressed)(const LinearParams&, int64_t task);          // as linear_bfloat16
  void (*linear_compressed_widened)(const LinearParams&, int64_t task);  // as linear_widened
  void (*linear_int8)(const LinearParams&, int64_t task);      // as linear, all in eight bits
  void (*to_bfloat16)(const ConvertRowParams&, int64_t row);
  int64_t bfloat16_row_words;  // that to_bfloat16 writes for two channels
  void (*to_int8)(const ConvertRowParams&, int64_t row);
  int64_t int8_row_words;  // that to_int8 writes for kGroup channels
  void (*quantize_panel)(const QuantizeParams&, int64_t panel);
  void (*features)(const FeatureParams&, int64_t token);
  void (*gelu)(const RowsParams&, int64_t row);
  void (*gelu_erf)(const RowsParams&, int64_t row);
  void (*elu_plus_one)(const RowsParams&, int64_t row);
  void (*layer_norm)(const NormParams&, int64_t row);
  void (*argmax)(const ArgmaxParams&, int64_t row);
  void (*sampling_weights)(const SamplingWeightsParams&);
  void (*silu)(const RowsParams&, int64_t row);
  void (*sigmoid)(const RowsParams&, int64_t row);
  void (*softplus)(const RowsParams&, int64_t row);
  void (*tanh)(const RowsParams&, int64_t row);
  void (*exp)(const RowsParams&, int64_t row);
  void (*rms_norm)(const RMSNormParams&, int64_t row);
  void (*short_convolution)(const ShortConvolutionParams&, int64_t task);  // segments × splits
  void (*selective_scan)(const SelectiveScanParams&, int64_t task);        // segments × splits
  void (*token_mix)(const TokenMixParams&, int64_t token);
  void (*relu_squared)(const RowsParams&, int64_t row);
  void (*rwkv7_heads)(const RWKV7HeadsParams&, int64_t task);    // segments × heads
  void (*mamba2_heads)(const Mamba2HeadsParams&, int64_t task);  // segments × heads
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

// Whether memory that is read row after row should be prefetched ahead.
bool prefetches_ahead();

// The best table that this machine supports, or the one that COTTENTION_CPU_ISA names.
const Kernels& kernels();

}  // namespace cottention
