// Schemas of the ops that CUDA has; what the CPU alone has is in registration.cpp.
#pragma once

namespace cottention {

constexpr const char* kCudaSchemas[] = {
    "recurrent_step(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor(b!)? z, "
    "Tensor state_indices, Tensor? cu_seqlens=None, Tensor? w=None, Tensor? a=None, "
    "Tensor? b=None) -> Tensor",
    "recurrent_pieces(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor(b!)? z, "
    "Tensor pieces, int num_cut) -> Tensor",
    "cottention_attention_gelu(Tensor joined, Tensor positions, Tensor sigma, Tensor cos, "
    "Tensor sin, Tensor(a!) state, Tensor state_indices, Tensor? cu_seqlens, "
    "Tensor(b!) out) -> ()",
    "cottention_pieces_gelu(Tensor joined, Tensor positions, Tensor sigma, Tensor cos, "
    "Tensor sin, Tensor(a!) state, Tensor pieces, int num_cut, Tensor(b!) out) -> ()",
    "cottention_delayed_gelu(Tensor joined, Tensor positions, Tensor sigma, Tensor cos, "
    "Tensor sin, Tensor(a!) state, Tensor(b!) keys, Tensor(c!) values, Tensor counts, "
    "Tensor state_indices, Tensor(d!) out) -> ()",
    "map_gelu(Tensor joined, int map, Tensor cos, Tensor sin, Tensor? table, Tensor? projection, "
    "Tensor? normed, Tensor? gate_weight, Tensor? gate_bias, Tensor(a!) q, Tensor(b!) k, "
    "Tensor(c!) v, Tensor(d!)? w, Tensor(e!) out) -> ()",
    "divide_outputs(Tensor mixed, float floor, Tensor(a!) out) -> ()",
    "fold_updates(Tensor(a!) state, Tensor keys, Tensor values, Tensor counts, "
    "Tensor rows) -> ()",
    "add_layer_norm(Tensor(a!) x, Tensor? y, Tensor weight, Tensor bias, float epsilon, "
    "Tensor(b!) out) -> ()",
};

}  // namespace cottention
