// The ops on CUDA; their arguments are those of the schemas in csrc/schemas.h.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>

namespace cottention::cuda {

using torch::stable::Tensor;

Tensor recurrent_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state,
                      const std::optional<Tensor>& z, const Tensor& state_indices,
                      const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& w,
                      const std::optional<Tensor>& a, const std::optional<Tensor>& b);
Tensor recurrent_pieces(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state,
                        const std::optional<Tensor>& z, const Tensor& pieces, int64_t num_cut);
void cottention_attention_gelu(const Tensor& joined, const Tensor& positions, const Tensor& sigma,
                               const Tensor& cos, const Tensor& sin, const Tensor& state,
                               const Tensor& state_indices, const std::optional<Tensor>& cu_seqlens,
                               const Tensor& out);
void cottention_pieces_gelu(const Tensor& joined, const Tensor& positions, const Tensor& sigma,
                            const Tensor& cos, const Tensor& sin, const Tensor& state,
                            const Tensor& pieces, int64_t num_cut, const Tensor& out);
void cottention_delayed_gelu(const Tensor& joined, const Tensor& positions, const Tensor& sigma,
                             const Tensor& cos, const Tensor& sin, const Tensor& state,
                             const Tensor& keys, const Tensor& values, const Tensor& counts,
                             const Tensor& state_indices, const Tensor& out);
void map_gelu(const Tensor& joined, int64_t map, const Tensor& cos, const Tensor& sin,
              const std::optional<Tensor>& table, const std::optional<Tensor>& projection,
              const std::optional<Tensor>& normed, const std::optional<Tensor>& gate_weight,
              const std::optional<Tensor>& gate_bias, const Tensor& q, const Tensor& k,
              const Tensor& v, const std::optional<Tensor>& w, const Tensor& out);
void divide_outputs(const Tensor& mixed, double floor, const Tensor& out);
void fold_updates(const Tensor& state, const Tensor& keys, const Tensor& values,
                  const Tensor& counts, const Tensor& rows);
void add_layer_norm(const Tensor& x, const std::optional<Tensor>& y, const Tensor& weight,
                    const Tensor& bias, double epsilon, const Tensor& out);

// Registers all of them with a library's block of implementations.
inline void register_all(torch::stable::detail::StableLibrary& m) {
  m.impl("recurrent_step", TORCH_BOX(&recurrent_step));
  m.impl("recurrent_pieces", TORCH_BOX(&recurrent_pieces));
  m.impl("cottention_attention_gelu", TORCH_BOX(&cottention_attention_gelu));
  m.impl("cottention_pieces_gelu", TORCH_BOX(&cottention_pieces_gelu));
  m.impl("cottention_delayed_gelu", TORCH_BOX(&cottention_delayed_gelu));
  m.impl("map_gelu", TORCH_BOX(&map_gelu));
  m.impl("divide_outputs", TORCH_BOX(&divide_outputs));
  m.impl("fold_updates", TORCH_BOX(&fold_updates));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
}

}  // namespace cottention::cuda
