// rwkv7_layers on the CPU: all blocks of an RWKV-7 model in one call, with the bits of the ops that
// engine/models/rwkv7/model.py calls one by one.
//
// x [N, C] is updated in place; weights has kWeights tensors for each block, in the order of
// `Weights`; state [S, L, H, K, K] and the shifts [S, L, C] are updated in place; state_indices
// int32 [B]; cu_seqlens int32 [B + 1] or none; ranks: of the low-rank products of w, a, g and v.
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "ops.h"
#include "pool.h"

namespace cottention {
namespace {

constexpr int64_t kRowsPerThread = 32768;  // elements, for steps that read and write them once
constexpr int64_t kMixes = 6;              // r, w, k, v, a, g

enum Weights {
  kNormWeight,
  kNormBias,
  kMix,  // [6, C]
  kReceptance,
  kKey,
  kValue,
  kOutput,
  kWDown,
  kWUp,
  kWBias,
  kADown,
  kAUp,
  kABias,
  kGDown,
  kGUp,
  kVDown,  // unused in the first block, as the next two
  kVUp,
  kVBias,
  kKK,
  kKA,
  kRK,
  kGroupNormWeight,
  kGroupNormBias,
  kFFNNormWeight,
  kFFNNormBias,
  kFFNMix,  // [1, C]
  kFFNKey,
  kFFNValue,
  kWeights
};

struct Batch {
  Tensor state_indices;
  std::optional<Tensor> cu_seqlens;
  int64_t tokens;

  int64_t segments() const { return state_indices.size(0); }
  int64_t first(int64_t segment) const {
    return cu_seqlens ? cu_seqlens->const_data_ptr<int32_t>()[segment] : segment;
  }
  int32_t slot(int64_t segment) const {
    return state_indices.const_data_ptr<int32_t>()[segment];
  }
};

template <class Task>
void for_each_row(int64_t rows, int64_t elements, const Task& task) {
  for_each_task(rows, kRowsPerThread / std::max<int64_t>(1, elements), task);
}

void check_vector(const Tensor& x, const char* name, int64_t rows, int64_t channels) {
  check_contiguous(x, name, 2, ScalarType::Float);
  check_size(x, name, 0, rows);
  check_size(x, name, 1, channels);
}

// The rows before each token: that of the pool for the first of a segment. Padding has its own.
std::vector<const float*> rows_before(const Batch& batch, const Tensor& y, const Tensor& tail) {
  const int64_t channels = y.size(1);
  const float* row = y.const_data_ptr<float>();
  std::vector<const float*> before(batch.tokens);
  for (int64_t i = 0; i < batch.segments(); ++i)
    for (int64_t t = batch.first(i); t < batch.first(i + 1); ++t) {
      before[t] = row + (t - 1) * channels;
      if (batch.slot(i) == kPaddingSlot)
        before[t] = row + t * channels;
      else if (t == batch.first(i))
        before[t] = tail.const_data_ptr<float>() + batch.slot(i) * tail.stride(0);
    }
  return before;
}

// out[i] = y + (before - y) mix[i]; the pool's rows are then the last of each segment.
void shift(const Batch& batch, const Tensor& y, const Tensor& tail, const Tensor& mix,
           const Tensor& out) {
  const int64_t channels = y.size(1);
  check_vector(mix, "mix", out.size(0), channels);
  const std::vector<const float*> before = rows_before(batch, y, tail);
  TokenMixParams p{y.const_data_ptr<float>(), before.data(), mix.const_data_ptr<float>(),
                   out.mutable_data_ptr<float>()};
  p.channels = channels;
  p.mixes = mix.size(0);
  p.mix_stride = out.stride(0);
  for_each_row(batch.tokens, p.mixes * channels,
               [&](int64_t token) { kernels().token_mix(p, token); });
  for (int64_t i = 0; i < batch.segments(); ++i) {
    if (batch.slot(i) == kPaddingSlot || batch.first(i) == batch.first(i + 1)) continue;
    const float* last = p.y + (batch.first(i + 1) - 1) * channels;
    std::copy(last, last + channels, tail.mutable_data_ptr<float>() + batch.slot(i) * tail.stride(0));
  }
}

void each_row(const Tensor& x, void (*kernel)(const RowsParams&, int64_t)) {
  const RowsParams p{x.const_data_ptr<float>(), x.mutable_data_ptr<float>(), x.size(1), x.size(1),
                     x.size(1)};
  for_each_row(x.size(0), x.size(1), [&](int64_t row) { kernel(p, row); });
}

// The buffers of a call, each contiguous.
struct Buffers {
  Tensor y, mixes, r, k, v, v_first, v_mix, w, a, b, g, out, low_w, low_a, low_g, low_v, ffn_mix,
      inner;
};

Buffers make_buffers(const Tensor& x, const std::vector<int64_t>& ranks, int64_t inner) {
  const int64_t tokens = x.size(0), channels = x.size(1);
  const auto rows = [&](int64_t width) { return torch::stable::new_empty(x, {tokens, width}); };
  Buffers s{rows(channels), torch::stable::new_empty(x, {kMixes, tokens, channels})};
  for (Tensor* each : {&s.r, &s.k, &s.v, &s.v_first, &s.v_mix, &s.w, &s.a, &s.b, &s.g, &s.out})
    *each = rows(channels);
  s.low_w = rows(ranks[0]);
  s.low_a = rows(ranks[1]);
  s.low_g = rows(ranks[2]);
  s.low_v = rows(ranks[3]);
  s.ffn_mix = torch::stable::new_empty(x, {1, tokens, channels});
  s.inner = rows(inner);
  return s;
}

// The products of the mixed rows: first all that these are multiplied with, then what comes after
// the low ranks.
void project(const Tensor* w, const Buffers& s, bool is_first) {
  const auto mixed = [&](int64_t i) { return torch::stable::select(s.mixes, 0, i); };
  std::vector<LinearCall> calls{{mixed(0), w[kReceptance], std::nullopt, s.r},
                                {mixed(2), w[kKey], std::nullopt, s.k},
                                {mixed(3), w[kValue], std::nullopt, is_first ? s.v_first : s.v},
                                {mixed(1), w[kWDown], std::nullopt, s.low_w},
                                {mixed(4), w[kADown], std::nullopt, s.low_a},
                                {mixed(5), w[kGDown], std::nullopt, s.low_g}};
  if (!is_first) calls.push_back({mixed(3), w[kVDown], std::nullopt, s.low_v});
  linear_out_all(calls);
  each_row(s.low_w, kernels().tanh);
  each_row(s.low_g, kernels().sigmoid);
  calls = {{s.low_w, w[kWUp], w[kWBias], s.w},
           {s.low_a, w[kAUp], w[kABias], s.a},
           {s.low_g, w[kGUp], std::nullopt, s.g}};
  if (!is_first) calls.push_back({s.low_v, w[kVUp], w[kVBias], s.v_mix});
  linear_out_all(calls);
}

void run_heads(const Batch& batch, const Tensor* w, const Buffers& s, const Tensor& state,
               bool is_first, double epsilon) {
  const int64_t heads = state.size(1), width = state.size(2);
  for (int64_t i : {int64_t(kKK), int64_t(kKA), int64_t(kRK), int64_t(kGroupNormWeight),
                    int64_t(kGroupNormBias)})
    check_vector(w[i], "a weight of the heads", heads, width);
  const std::vector<int32_t> order = slot_order(batch.state_indices);
  RWKV7HeadsParams p{
      pool_params(state, batch.state_indices, batch.cu_seqlens, batch.tokens, order)};
  const auto data = [](const Tensor& x) { return x.mutable_data_ptr<float>(); };
  p.r = data(s.r);
  p.k = data(s.k);
  p.v = data(is_first ? s.v_first : s.v);
  p.w = data(s.w);
  p.a = data(s.a);
  p.b = data(s.b);
  p.g = data(s.g);
  p.v_first = data(s.v_first);
  p.v_mix = is_first ? nullptr : data(s.v_mix);
  p.k_k = w[kKK].const_data_ptr<float>();
  p.k_a = w[kKA].const_data_ptr<float>();
  p.r_k = w[kRK].const_data_ptr<float>();
  p.norm_weight = w[kGroupNormWeight].const_data_ptr<float>();
  p.norm_bias = w[kGroupNormBias].const_data_ptr<float>();
  p.unit_weight = static_cast<float>(std::pow(double(width), -0.5));
  p.norm_epsilon = static_cast<float>(epsilon);
  const auto view = [&](const float* x) { return HeadView{x, heads * width, width}; };
  RecurrentParams& step = p.recurrent;
  step.q = view(p.r);
  step.k = view(p.k);
  step.v = view(p.v);
  step.decay = Decay::kPerKey;
  step.w = view(p.w);
  step.has_term = true;
  step.a = view(p.a);
  step.b = view(p.b);
  step.out = data(s.out);
  step.out_stride = heads * width;
  split_rows(step, width);
  for_each_head(step, batch.tokens, 1, [&](int64_t task) { kernels().rwkv7_heads(p, task); });
}

void check_shift(const Tensor& shift, const char* name, const Tensor& state, int64_t channels) {
  check_tensor(shift, name, 3, ScalarType::Float);
  check_size(shift, name, 0, state.size(0));
  check_size(shift, name, 1, state.size(1));
  check_size(shift, name, 2, channels);
  check_pool(shift, name);
}

}  // namespace

void rwkv7_layers(const Tensor& x, const std::vector<Tensor>& weights, double epsilon,
                  double group_epsilon, const std::vector<int64_t>& ranks, int64_t inner,
                  const Tensor& state, const Tensor& att_shift, const Tensor& ffn_shift,
                  const Tensor& state_indices, const std::optional<Tensor>& cu_seqlens) {
  check_contiguous(x, "x", 2, ScalarType::Float);
  check_tensor(state, "state", 5, ScalarType::Float);
  const int64_t layers = state.size(1), heads = state.size(2), width = state.size(3);
  const int64_t given = weights.size(), num_ranks = ranks.size();
  STD_TORCH_CHECK(given == layers * kWeights, "weights has ", given, " tensors for ", layers,
                  " layers of ", int64_t(kWeights));
  STD_TORCH_CHECK(num_ranks == 4, "ranks must be those of w, a, g and v");
  check_size(x, "x", 1, heads * width);
  check_pool(state, "state");
  check_shift(att_shift, "att_shift", state, heads * width);
  check_shift(ffn_shift, "ffn_shift", state, heads * width);
  check_widths(width, width);
  check_state(torch::stable::select(state, 1, 0), heads, width, width);
  check_state_indices(state_indices, state.size(0));
  check_cu_seqlens(cu_seqlens, state_indices.size(0), x.size(0));
  const Batch batch{state_indices, cu_seqlens, x.size(0)};
  if (batch.tokens == 0) return;
  const Buffers s = make_buffers(x, ranks, inner);
  with_team(batch.tokens * x.size(1) * inner > kProductsPerThread, [&] {
    for (int64_t layer = 0; layer < layers; ++layer) {
      const Tensor* w = &weights[layer * kWeights];
      const auto of_layer = [&](const Tensor& pool) { return torch::stable::select(pool, 1, layer); };
      layer_norm(x, w[kNormWeight], w[kNormBias], epsilon, s.y);
      shift(batch, s.y, of_layer(att_shift), w[kMix], s.mixes);
      project(w, s, layer == 0);
      run_heads(batch, w, s, of_layer(state), layer == 0, group_epsilon);
      linear_add(s.out, w[kOutput], std::nullopt, x);
      layer_norm(x, w[kFFNNormWeight], w[kFFNNormBias], epsilon, s.y);
      shift(batch, s.y, of_layer(ffn_shift), w[kFFNMix], s.ffn_mix);
      linear_out(torch::stable::select(s.ffn_mix, 0, 0), w[kFFNKey], std::nullopt, s.inner);
      each_row(s.inner, kernels().relu_squared);
      linear_add(s.inner, w[kFFNValue], std::nullopt, x);
    }
  });
}

}  // namespace cottention
