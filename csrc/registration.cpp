// Schemas of the ops and their CPU implementations, registered with torch's dispatcher.
#include <torch/csrc/stable/library.h>

#include "ops.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(cottention, m) {
  for (const char* schema : cottention::kCudaSchemas) m.def(schema);
  m.def("zero_large_pages(Tensor(a!) x) -> ()");
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def("compress_weight(Tensor packed) -> Tensor");
  m.def("quantize_weight(Tensor weight) -> Tensor");
  m.def("linear(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor");
  m.def("rotary_table(Tensor positions, int rotary_dim, float base) -> (Tensor, Tensor)");
  m.def(
      "cottention_features(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor sigma, "
      "Tensor cos, Tensor sin) -> (Tensor, Tensor, Tensor)");
  m.def("gelu_new(Tensor x) -> Tensor");
  m.def("gelu_erf(Tensor x) -> Tensor");
  m.def("elu_plus_one(Tensor x) -> Tensor");
  m.def("silu(Tensor x) -> Tensor");
  m.def("sigmoid(Tensor x) -> Tensor");
  m.def("softplus(Tensor x) -> Tensor");
  m.def("tanh(Tensor x) -> Tensor");
  m.def("exp(Tensor x) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float epsilon, int groups) -> Tensor");
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor log_decay, Tensor k, Tensor q, "
      "Tensor(a!) state, Tensor state_indices, Tensor? cu_seqlens=None) -> Tensor");
  m.def(
      "short_convolution(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) tails, "
      "Tensor state_indices, Tensor? cu_seqlens=None) -> Tensor");
  m.def("argmax(Tensor logits) -> Tensor");
  m.def("sample(Tensor logits, Tensor argmax, Tensor sampling_rows) -> Tensor");
  m.def(
      "apply_token_bitmask(Tensor(a!) logits, Tensor rows, Tensor bitmask, Tensor places) -> ()");
  m.def("linear_out(Tensor x, Tensor packed, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("linear_add(Tensor x, Tensor packed, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float epsilon, Tensor(a!) out) -> ()");
  m.def(
      "cottention_layers(Tensor(a!) x, Tensor[] weights, float epsilon, Tensor positions, "
      "Tensor cos, Tensor sin, Tensor(b!) state, Tensor state_indices, Tensor? cu_seqlens, "
      "Tensor(c!) normed, Tensor(d!) joined, Tensor(e!) attn_gelu) -> ()");
  m.def(
      "mamba2_layers(Tensor(a!) x, Tensor[] weights, float epsilon, int groups, "
      "float[] step_limit, Tensor(b!) state, Tensor(c!) conv, Tensor state_indices, "
      "Tensor? cu_seqlens) -> ()");
  m.def(
      "rwkv7_layers(Tensor(a!) x, Tensor[] weights, float epsilon, float group_epsilon, "
      "int[] ranks, int inner, Tensor(b!) state, Tensor(c!) att_shift, Tensor(d!) ffn_shift, "
      "Tensor state_indices, Tensor? cu_seqlens) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cottention, CPU, m) {
  m.impl("recurrent_step", TORCH_BOX(&cottention::recurrent_step));
  m.impl("zero_large_pages", TORCH_BOX(&cottention::zero_large_pages));
  m.impl("pack_weight", TORCH_BOX(&cottention::pack_weight));
  m.impl("compress_weight", TORCH_BOX(&cottention::compress_weight));
  m.impl("quantize_weight", TORCH_BOX(&cottention::quantize_weight));
  m.impl("linear", TORCH_BOX(&cottention::linear));
  m.impl("rotary_table", TORCH_BOX(&cottention::rotary_table));
  m.impl("cottention_features", TORCH_BOX(&cottention::cottention_features));
  m.impl("gelu_new", TORCH_BOX(&cottention::gelu_new));
  m.impl("gelu_erf", TORCH_BOX(&cottention::gelu_erf));
  m.impl("elu_plus_one", TORCH_BOX(&cottention::elu_plus_one));
  m.impl("silu", TORCH_BOX(&cottention::silu));
  m.impl("sigmoid", TORCH_BOX(&cottention::sigmoid));
  m.impl("softplus", TORCH_BOX(&cottention::softplus));
  m.impl("tanh", TORCH_BOX(&cottention::tanh));
  m.impl("exp", TORCH_BOX(&cottention::exp));
  m.impl("rms_norm", TORCH_BOX(&cottention::rms_norm));
  m.impl("selective_scan", TORCH_BOX(&cottention::selective_scan));
  m.impl("short_convolution", TORCH_BOX(&cottention::short_convolution));
  m.impl("argmax", TORCH_BOX(&cottention::argmax));
  m.impl("sample", TORCH_BOX(&cottention::sample));
  m.impl("apply_token_bitmask", TORCH_BOX(&cottention::apply_token_bitmask));
  m.impl("linear_out", TORCH_BOX(&cottention::linear_out));
  m.impl("linear_add", TORCH_BOX(&cottention::linear_add));
  m.impl("layer_norm", TORCH_BOX(&cottention::layer_norm));
  m.impl("cottention_attention_gelu", TORCH_BOX(&cottention::cottention_attention_gelu));
  m.impl("cottention_layers", TORCH_BOX(&cottention::cottention_layers));
  m.impl("mamba2_layers", TORCH_BOX(&cottention::mamba2_layers));
  m.impl("rwkv7_layers", TORCH_BOX(&cottention::rwkv7_layers));
}
