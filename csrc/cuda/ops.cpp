// The ops on CUDA: checks and calls.
//
// Arguments and shapes are those of the CPU ops; q, k and v, and the joined and out of the fused
// ops, may be float32, bfloat16 or float16, all of one type. pieces int32 [P, 5] are described in
// params.h.
#include "ops.h"

#include <utility>

#include "../features.h"
#include "arguments.h"

namespace cottention::cuda {
namespace {

// q, k [N, H, K] and v [N, H, V] with a state [S, H, V, K] and z [S, H, K] or none.
void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state,
                  const std::optional<Tensor>& z, const Device& device) {
  check_rows(q, "q", 3, q.scalar_type(), device);
  check_rows(k, "k", 3, q.scalar_type(), device);
  check_rows(v, "v", 3, q.scalar_type(), device);
  for (int64_t dim = 0; dim < 3; ++dim) check_size(k, "k", dim, q.size(dim));
  for (int64_t dim = 0; dim < 2; ++dim) check_size(v, "v", dim, q.size(dim));
  check_widths(q.size(2), v.size(2));
  check_pools(state, z, q.size(1), v.size(2), q.size(2), device);
}

// Both passes over pieces. What they keep between them is allocated here.
void run_pieces(StepParams& p, const Tensor& state, const std::optional<Tensor>& z,
                const Tensor& pieces, int64_t num_cut, Type in, Type out, bool is_after_map,
                void* stream) {
  p.pieces = static_cast<const Piece*>(pieces.data_ptr());
  p.segments = pieces.size(0);
  std::optional<Tensor> cut, cut_z;
  if (num_cut > 0) {
    cut = torch::stable::new_empty(state, {num_cut, p.heads, p.value_width, p.key_width});
    p.cut_state = static_cast<float*>(cut->data_ptr());
    if (z) cut_z = torch::stable::new_empty(*z, {num_cut, p.heads, p.key_width});
    if (z) p.cut_z = static_cast<float*>(cut_z->data_ptr());
  }
  check_launch(launch_pieces(p, in, out, Pass::kFirst, is_after_map, stream));
  if (num_cut == 0) return;
  p.segments = num_cut;
  check_launch(launch_pieces(p, in, out, Pass::kLater, false, stream));
}

// joined [N, 3C + inner] and out [N, C + inner] with a state [S, H, D, D], C = H D.
void check_fused(const Tensor& joined, const Tensor& positions, const Tensor& sigma,
                 const Tensor& cos, const Tensor& sin, const Tensor& state, const Tensor& out,
                 const Device& device) {
  check_contiguous(joined, "joined", 2, joined.scalar_type(), device);
  check_contiguous(out, "out", 2, joined.scalar_type(), device);
  STD_TORCH_CHECK(state.dim() == 4, "state must have 4 dimensions, not ", state.dim());
  const int64_t tokens = joined.size(0), heads = state.size(1), width = state.size(2);
  check_pools(state, std::nullopt, heads, width, width, device);
  check_fused_width(width);
  STD_TORCH_CHECK(joined.size(1) >= 3 * heads * width, "joined is too narrow for q, k and v");
  check_size(out, "out", 0, tokens);
  check_size(out, "out", 1, joined.size(1) - 2 * heads * width);
  check_positions(positions, cos, sin, tokens, width, device);
  check_sigma(sigma, heads, device);
}

// All but positions and sigma.
FeaturesGeluParams joined_params(const Tensor& joined, const Tensor& cos, const Tensor& sin,
                                 const Tensor& out, int64_t heads, int64_t width) {
  const int64_t channels = heads * width, stride = joined.size(1);
  const int64_t bytes = bytes_of(type_of(joined, "joined"));
  const char* x = static_cast<const char*>(joined.data_ptr());
  FeaturesGeluParams m{{x, stride, width},
                       {x + channels * bytes, stride, width},
                       {x + 2 * channels * bytes, stride, width}};
  m.cos = static_cast<const float*>(cos.data_ptr());
  m.sin = static_cast<const float*>(sin.data_ptr());
  m.up = x + 3 * channels * bytes;
  m.up_stride = stride;
  m.gelu = static_cast<char*>(out.data_ptr()) + channels * bytes;
  m.gelu_stride = out.size(1);
  m.tokens = joined.size(0);
  m.heads = static_cast<int>(heads);
  m.width = static_cast<int>(width);
  m.pairs = static_cast<int>(cos.size(1));
  m.inner = static_cast<int>(stride - 3 * channels);
  m.is_aligned = is_aligned(m.up, bytes, m.up_stride) && is_aligned(m.gelu, bytes, m.gelu_stride);
  m.is_inputs_aligned = is_aligned(m.q.data, bytes, stride, width) &&
                        is_aligned(m.k.data, bytes, stride, width);
  return m;
}

FeaturesGeluParams features_gelu_params(const Tensor& joined, const Tensor& positions,
                                        const Tensor& sigma, const Tensor& cos, const Tensor& sin,
                                        const Tensor& out, int64_t width) {
  FeaturesGeluParams m = joined_params(joined, cos, sin, out, sigma.size(0), width);
  m.positions = static_cast<const int64_t*>(positions.data_ptr());
  m.sigma = static_cast<const double*>(sigma.data_ptr());
  return m;
}

// The rows of one head's projection, whose products with q and k are the features; 0 without one.
int64_t check_projection(Map map, const std::optional<Tensor>& projection, int64_t heads,
                         int64_t width, const Device& device) {
  const bool is_per_head = map == Map::kFourier;
  STD_TORCH_CHECK(projection.has_value() == (is_per_head || map == Map::kPerformer),
                  "this map has ", projection ? "no" : "a", " projection");
  if (!projection) return 0;
  const int64_t dims = is_per_head ? 3 : 2;
  check_contiguous(*projection, "projection", dims, ScalarType::Float, device);
  if (is_per_head) check_size(*projection, "projection", 0, heads);
  check_size(*projection, "projection", dims - 1, width);
  STD_TORCH_CHECK(is_aligned(projection->data_ptr(), 4, width),
                  "projection must begin at a multiple of 16 bytes");
  return projection->size(dims - 2);
}

// normed float32 [N, C], weight [H, C], bias [H] and w [N, H]; all or none.
void check_gate(const std::optional<Tensor>& normed, const std::optional<Tensor>& weight,
                const std::optional<Tensor>& bias, const std::optional<Tensor>& w, int64_t tokens,
                int64_t heads, const Device& device) {
  const bool is_gated = normed.has_value();
  STD_TORCH_CHECK(weight.has_value() == is_gated && bias.has_value() == is_gated &&
                      w.has_value() == is_gated,
                  "normed, gate_weight, gate_bias and w must be given together");
  if (!is_gated) return;
  check_contiguous(*normed, "normed", 2, ScalarType::Float, device);
  check_contiguous(*weight, "gate_weight", 2, ScalarType::Float, device);
  check_contiguous(*bias, "gate_bias", 1, ScalarType::Float, device);
  check_contiguous(*w, "w", 2, ScalarType::Float, device);
  check_size(*normed, "normed", 0, tokens);
  check_size(*weight, "gate_weight", 0, heads);
  check_size(*weight, "gate_weight", 1, normed->size(1));
  check_size(*bias, "gate_bias", 0, heads);
  check_size(*w, "w", 0, tokens);
  check_size(*w, "w", 1, heads);
}

const float* floats(const std::optional<Tensor>& x) {
  return x ? static_cast<const float*>(x->data_ptr()) : nullptr;
}

void run_attention_gelu(const Tensor& joined, const Tensor& positions, const Tensor& sigma,
                        const Tensor& cos, const Tensor& sin, const Tensor& state,
                        const DelayedUpdates& delayed, const Tensor& state_indices,
                        const Tensor& out) {
  const Type type = type_of(joined, "joined");
  const Device device = device_of(joined);
  check_fused(joined, positions, sigma, cos, sin, state, out, device);
  check_segments(state_indices, std::nullopt, joined.size(0), device);
  const int64_t width = state.size(2);
  if (joined.size(0) == 0 || state.size(1) == 0) return;
  StepParams p = step_params(state, std::nullopt, state_indices, std::nullopt, joined.size(0));
  p.delayed = delayed;
  p.out = out.data_ptr();
  p.out_stride = out.size(1);
  const FeaturesGeluParams m = features_gelu_params(joined, positions, sigma, cos, sin, out, width);
  const DeviceGuard guard(device.index());
  check_launch(launch_attention_gelu(p, m, type, current_stream(device)));
}

}  // namespace

Tensor recurrent_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state,
                      const std::optional<Tensor>& z, const Tensor& state_indices,
                      const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& w,
                      const std::optional<Tensor>& a, const std::optional<Tensor>& b) {
  const Type type = type_of(q, "q");
  const Device device = device_of(q);
  check_inputs(q, k, v, state, z, device);
  check_segments(state_indices, cu_seqlens, q.size(0), device);
  check_terms(q, w, a, b, z.has_value(), device);
  Tensor out = torch::stable::new_empty(v, {v.size(0), v.size(1), v.size(2)});
  if (q.size(0) == 0 || q.size(1) == 0) return out;
  StepParams p = step_params(state, z, state_indices, cu_seqlens, q.size(0));
  set_inputs(p, q, k, v, out, bytes_of(type));
  set_terms(p, w, a, b);
  const DeviceGuard guard(device.index());
  check_launch(launch_step(p, type, current_stream(device)));
  return out;
}

Tensor recurrent_pieces(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state,
                        const std::optional<Tensor>& z, const Tensor& pieces, int64_t num_cut) {
  const Type type = type_of(q, "q");
  const Device device = device_of(q);
  check_inputs(q, k, v, state, z, device);
  check_pieces(pieces, num_cut, q.size(0), device);
  Tensor out = torch::stable::new_empty(v, {v.size(0), v.size(1), v.size(2)});
  if (q.size(0) == 0 || q.size(1) == 0) return out;
  StepParams p = pool_params(state, z, q.size(0));
  set_inputs(p, q, k, v, out, bytes_of(type));
  const DeviceGuard guard(device.index());
  run_pieces(p, state, z, pieces, num_cut, type, type, false, current_stream(device));
  return out;
}

// One kernel, and one token for each of state_indices: segments of several are pieces.
void cottention_attention_gelu(const Tensor& joined, const Tensor& positions, const Tensor& sigma,
                               const Tensor& cos, const Tensor& sin, const Tensor& state,
                               const Tensor& state_indices, const std::optional<Tensor>& cu_seqlens,
                               const Tensor& out) {
  STD_TORCH_CHECK(!cu_seqlens, "on CUDA, cottention_pieces_gelu takes segments of several tokens");
  run_attention_gelu(joined, positions, sigma, cos, sin, state, DelayedUpdates{}, state_indices,
                     out);
}

// As cottention_attention_gelu, for states with delayed updates. It changes no counts: the caller
// does so after the last layer, modulo the number of updates that keys and values have room for.
void cottention_delayed_gelu(const Tensor& joined, const Tensor& positions, const Tensor& sigma,
                             const Tensor& cos, const Tensor& sin, const Tensor& state,
                             const Tensor& keys, const Tensor& values, const Tensor& counts,
                             const Tensor& state_indices, const Tensor& out) {
  const Device device = device_of(joined);
  STD_TORCH_CHECK(state.dim() == 4, "state must have 4 dimensions, not ", state.dim());
  check_delayed(keys, values, counts, state, device);
  run_attention_gelu(joined, positions, sigma, cos, sin, state,
                     delayed_updates(keys, values, counts), state_indices, out);
}

// rows int32 [B], each slot at most once; those out of range are skipped. Changes no counts.
void fold_updates(const Tensor& state, const Tensor& keys, const Tensor& values,
                  const Tensor& counts, const Tensor& rows) {
  const Device device = device_of(state);
  STD_TORCH_CHECK(state.dim() == 4, "state must have 4 dimensions, not ", state.dim());
  check_widths(state.size(3), state.size(2));
  check_pools(state, std::nullopt, state.size(1), state.size(2), state.size(3), device);
  check_delayed(keys, values, counts, state, device);
  check_contiguous(rows, "rows", 1, ScalarType::Int, device);
  if (rows.size(0) == 0 || state.size(1) == 0) return;
  StepParams p = step_params(state, std::nullopt, rows, std::nullopt, rows.size(0));
  p.delayed = delayed_updates(keys, values, counts);
  const DeviceGuard guard(device.index());
  check_launch(launch_fold(p, current_stream(device)));
}

// Two or three kernels: the first maps q, k and v into a temporary buffer and computes the gelu.
void cottention_pieces_gelu(const Tensor& joined, const Tensor& positions, const Tensor& sigma,
                            const Tensor& cos, const Tensor& sin, const Tensor& state,
                            const Tensor& pieces, int64_t num_cut, const Tensor& out) {
  const Type type = type_of(joined, "joined");
  const Device device = device_of(joined);
  check_fused(joined, positions, sigma, cos, sin, state, out, device);
  const int64_t tokens = joined.size(0), heads = state.size(1), width = state.size(2);
  check_pieces(pieces, num_cut, tokens, device);
  if (tokens == 0 || heads == 0) return;
  const Tensor mapped = torch::stable::new_empty(state, {3, tokens, heads, width});
  FeaturesGeluParams m = features_gelu_params(joined, positions, sigma, cos, sin, out, width);
  m.q_out = static_cast<float*>(mapped.data_ptr());
  m.k_out = m.q_out + tokens * heads * width;
  m.v_out = m.k_out + tokens * heads * width;
  StepParams p = pool_params(state, std::nullopt, tokens);
  p.q = {m.q_out, heads * width, width};
  p.k = {m.k_out, heads * width, width};
  p.v = {m.v_out, heads * width, width};
  p.is_aligned = true;
  p.out = out.data_ptr();
  p.out_stride = out.size(1);
  const DeviceGuard guard(device.index());
  void* stream = current_stream(device);
  check_launch(launch_features_gelu(m, type, stream));
  run_pieces(p, state, std::nullopt, pieces, num_cut, Type::kFloat, type, true, stream);
}

// One kernel. joined [N, 3C + inner] and out [N, C + inner] of one type, of which the gelu's columns
// are written; q, k [N, H, K], v [N, H, V] and w [N, H], float32, are written: v continued by a one
// and zeros where V is more than the width of a head, and scaled by 1 − w where there is a gate.
void map_gelu(const Tensor& joined, int64_t map, const Tensor& cos, const Tensor& sin,
              const std::optional<Tensor>& table, const std::optional<Tensor>& projection,
              const std::optional<Tensor>& normed, const std::optional<Tensor>& gate_weight,
              const std::optional<Tensor>& gate_bias, const Tensor& q, const Tensor& k,
              const Tensor& v, const std::optional<Tensor>& w, const Tensor& out) {
  const Type type = type_of(joined, "joined");
  const Device device = device_of(joined);
  STD_TORCH_CHECK(map >= 0 && map <= int64_t(Map::kFourier), "map must be 0 to 3, not ", map);
  const Map kind = static_cast<Map>(map);
  check_contiguous(joined, "joined", 2, joined.scalar_type(), device);
  check_contiguous(out, "out", 2, joined.scalar_type(), device);
  check_contiguous(q, "q", 3, ScalarType::Float, device);
  check_contiguous(k, "k", 3, ScalarType::Float, device);
  check_contiguous(v, "v", 3, ScalarType::Float, device);
  const int64_t tokens = joined.size(0), heads = q.size(1), twice = joined.size(1) - out.size(1);
  STD_TORCH_CHECK(heads > 0 && twice >= 0 && twice % (2 * heads) == 0,
                  "joined and out must differ by twice the channels of ", heads, " heads");
  const int64_t width = twice / (2 * heads);
  check_fused_width(width);
  STD_TORCH_CHECK(out.size(1) >= heads * width, "out is too narrow for the values");
  check_size(out, "out", 0, tokens);
  check_rotary(cos, sin, tokens, width, device);
  const int64_t features = check_projection(kind, projection, heads, width, device);
  const int64_t key = kind == Map::kLinear      ? width
                      : kind == Map::kPerformer ? features
                      : kind == Map::kFourier   ? 2 * features
                                                : 2 * width;
  check_widths(key, v.size(2));
  for (const auto& [x, name] : {std::pair(&q, "q"), std::pair(&k, "k"), std::pair(&v, "v")}) {
    check_size(*x, name, 0, tokens);
    check_size(*x, name, 1, heads);
    if (x != &v) check_size(*x, name, 2, key);
  }
  STD_TORCH_CHECK(v.size(2) >= width, "v.size(2) must be at least ", width);
  STD_TORCH_CHECK(table.has_value() == (kind == Map::kCosFormer), "this map has ",
                  table ? "no" : "a", " table");
  if (table) {
    check_contiguous(*table, "table", 2, ScalarType::Float, device);
    check_size(*table, "table", 0, tokens);
    check_size(*table, "table", 1, 2);
  }
  check_gate(normed, gate_weight, gate_bias, w, tokens, heads, device);
  if (tokens == 0) return;
  MapParams m{};
  static_cast<FeaturesGeluParams&>(m) = joined_params(joined, cos, sin, out, heads, width);
  m.q_out = static_cast<float*>(q.data_ptr());
  m.k_out = static_cast<float*>(k.data_ptr());
  m.v_out = static_cast<float*>(v.data_ptr());
  m.map = kind;
  m.table = floats(table);
  m.projection = floats(projection);
  m.projection_stride = kind == Map::kFourier ? features * width : 0;
  m.normed = floats(normed);
  m.gate_weight = floats(gate_weight);
  m.gate_bias = floats(gate_bias);
  m.gate_out = w ? static_cast<float*>(w->data_ptr()) : nullptr;
  m.features = static_cast<int>(features);
  m.channels = normed ? static_cast<int>(normed->size(1)) : 0;
  m.key_width = static_cast<int>(key);
  m.value_width = static_cast<int>(v.size(2));
  const DeviceGuard guard(device.index());
  check_launch(launch_map_gelu(m, type, current_stream(device)));
}

// mixed float32 [N, H, D + 1 or more]; out [N, H, D] of any type, a part of wider rows.
void divide_outputs(const Tensor& mixed, double floor, const Tensor& out) {
  const Type type = type_of(out, "out");
  const Device device = device_of(mixed);
  check_contiguous(mixed, "mixed", 3, ScalarType::Float, device);
  check_rows(out, "out", 3, out.scalar_type(), device);
  for (int64_t dim = 0; dim < 2; ++dim) check_size(out, "out", dim, mixed.size(dim));
  STD_TORCH_CHECK(mixed.size(2) > out.size(2), "mixed has no column for the denominators");
  STD_TORCH_CHECK(out.size(1) <= 1 || out.stride(1) == out.size(2), "the heads of out must lie together");
  if (out.size(0) == 0 || out.size(1) == 0) return;
  DivideParams p{};
  p.mixed = static_cast<const float*>(mixed.data_ptr());
  p.out = out.data_ptr();
  p.tokens = mixed.size(0);
  p.out_stride = out.stride(0);
  p.heads = static_cast<int>(mixed.size(1));
  p.width = static_cast<int>(out.size(2));
  p.value_width = static_cast<int>(mixed.size(2));
  p.floor = static_cast<float>(floor);
  const DeviceGuard guard(device.index());
  check_launch(launch_divide(p, type, current_stream(device)));
}

// x float32 [R, C] and y, out [R, C] of any type, contiguous; weight and bias float32 [C].
void add_layer_norm(const Tensor& x, const std::optional<Tensor>& y, const Tensor& weight,
                    const Tensor& bias, double epsilon, const Tensor& out) {
  const Device device = device_of(x);
  check_contiguous(x, "x", 2, ScalarType::Float, device);
  check_contiguous(weight, "weight", 1, ScalarType::Float, device);
  check_contiguous(bias, "bias", 1, ScalarType::Float, device);
  check_size(weight, "weight", 0, x.size(1));
  check_size(bias, "bias", 0, x.size(1));
  const Type out_type = type_of(out, "out"), y_type = y ? type_of(*y, "y") : out_type;
  check_contiguous(out, "out", 2, out.scalar_type(), device);
  if (y) check_contiguous(*y, "y", 2, y->scalar_type(), device);
  for (int64_t dim = 0; dim < 2; ++dim) {
    check_size(out, "out", dim, x.size(dim));
    if (y) check_size(*y, "y", dim, x.size(dim));
  }
  if (x.size(0) == 0 || x.size(1) == 0) return;
  AddLayerNormParams p{};
  p.x = static_cast<float*>(x.data_ptr());
  p.y = y ? y->data_ptr() : nullptr;
  p.out = out.data_ptr();
  p.weight = static_cast<const float*>(weight.data_ptr());
  p.bias = static_cast<const float*>(bias.data_ptr());
  p.rows = x.size(0);
  p.columns = static_cast<int>(x.size(1));
  p.epsilon = static_cast<float>(epsilon);
  p.is_aligned = is_aligned(p.x, 4, p.columns) && is_aligned(p.weight, 4, 0) &&
                 is_aligned(p.bias, 4, 0) && is_aligned(p.out, bytes_of(out_type), 0) &&
                 (!y || is_aligned(p.y, bytes_of(y_type), 0));
  const DeviceGuard guard(device.index());
  check_launch(launch_add_layer_norm(p, y_type, out_type, current_stream(device)));
}

}  // namespace cottention::cuda
