// The CPU ops as registered with torch; shapes and meaning are given at each definition.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace cottention {

using torch::stable::Tensor;

Tensor recurrent_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state,
                      const std::optional<Tensor>& z, const Tensor& state_indices,
                      const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& w,
                      const std::optional<Tensor>& a, const std::optional<Tensor>& b);
void zero_large_pages(const Tensor& x);
Tensor pack_weight(const Tensor& weight);
Tensor compress_weight(const Tensor& packed);
Tensor quantize_weight(const Tensor& weight);
Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
              int64_t out_features);
void linear_out(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                const Tensor& out);
void linear_add(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                const Tensor& out);

// The arguments of a linear_out.
struct LinearCall {
  Tensor x, packed;
  std::optional<Tensor> bias;
  Tensor out;
};
void linear_out_all(const std::vector<LinearCall>& calls);

std::tuple<Tensor, Tensor> rotary_table(const Tensor& positions, int64_t rotary_dim, double base);
std::tuple<Tensor, Tensor, Tensor> cottention_features(const Tensor& q, const Tensor& k,
                                                       const Tensor& v, const Tensor& positions,
                                                       const Tensor& sigma, const Tensor& cos,
                                                       const Tensor& sin);
Tensor gelu_new(const Tensor& x);
Tensor gelu_erf(const Tensor& x);
Tensor elu_plus_one(const Tensor& x);
void layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double epsilon,
                const Tensor& out);
Tensor argmax(const Tensor& logits);
Tensor silu(const Tensor& x);
Tensor sigmoid(const Tensor& x);
Tensor softplus(const Tensor& x);
Tensor tanh(const Tensor& x);
Tensor exp(const Tensor& x);
Tensor rms_norm(const Tensor& x, const Tensor& weight, double epsilon, int64_t groups);
Tensor selective_scan(const Tensor& u, const Tensor& delta, const Tensor& log_decay,
                      const Tensor& k, const Tensor& q, const Tensor& state,
                      const Tensor& state_indices, const std::optional<Tensor>& cu_seqlens);
Tensor short_convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                         const Tensor& tails, const Tensor& state_indices,
                         const std::optional<Tensor>& cu_seqlens);
void apply_token_bitmask(const Tensor& logits, const Tensor& rows, const Tensor& bitmask,
                         const Tensor& places);
Tensor sample(const Tensor& logits, const Tensor& argmax, const Tensor& sampling_rows);
void cottention_attention_gelu(const Tensor& joined, const Tensor& positions, const Tensor& sigma,
                               const Tensor& cos, const Tensor& sin, const Tensor& state,
                               const Tensor& state_indices, const std::optional<Tensor>& cu_seqlens,
                               const Tensor& out);
void cottention_layers(const Tensor& x, const std::vector<Tensor>& weights, double epsilon,
                       const Tensor& positions, const Tensor& cos, const Tensor& sin,
                       const Tensor& state, const Tensor& state_indices,
                       const std::optional<Tensor>& cu_seqlens, const Tensor& normed,
                       const Tensor& joined, const Tensor& attn_gelu);
void mamba2_layers(const Tensor& x, const std::vector<Tensor>& weights, double epsilon,
                   int64_t groups, const std::vector<double>& step_limit, const Tensor& state,
                   const Tensor& conv, const Tensor& state_indices,
                   const std::optional<Tensor>& cu_seqlens);
void rwkv7_layers(const Tensor& x, const std::vector<Tensor>& weights, double epsilon,
                  double group_epsilon, const std::vector<int64_t>& ranks, int64_t inner,
                  const Tensor& state, const Tensor& att_shift, const Tensor& ffn_shift,
                  const Tensor& state_indices, const std::optional<Tensor>& cu_seqlens);

}  // namespace cottention
