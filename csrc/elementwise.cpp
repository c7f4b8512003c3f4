// rotary_table, cottention_features, gelu_new, gelu_erf, elu_plus_one, layer_norm and argmax on the
// CPU: checks and calls. The rotary angles are computed here, in float64; the other arithmetic is in
// elementwise.h and argmax.h.
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "checks.h"
#include "features.h"
#include "ops.h"
#include "parallel.h"

namespace cottention {
namespace {

constexpr int64_t kAnglesPerThread = 512;
constexpr int64_t kFeaturesPerThread = 16384;
constexpr int64_t kExponentialsPerThread = 16384;
constexpr int64_t kNormsPerThread = 65536;
constexpr int64_t kComparedPerThread = 262144;

int64_t grain_size(int64_t work, int64_t each) { return work / std::max<int64_t>(1, each); }

Tensor each_row(const Tensor& x, void (*kernel)(const RowsParams&, int64_t)) {
  check_rows(x, "x", 2);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  const RowsParams p{x.const_data_ptr<float>(), out.mutable_data_ptr<float>(), x.size(1),
                     x.stride(0), x.size(1)};
  for_each_task(x.size(0), grain_size(kExponentialsPerThread, x.size(1)),
                [&](int64_t row) { kernel(p, row); });
  return out;
}

void check_heads(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_rows(q, "q", 3);
  check_rows(k, "k", 3);
  check_rows(v, "v", 3);
  for (int64_t dim = 0; dim < 3; ++dim) {
    check_size(k, "k", dim, q.size(dim));
    check_size(v, "v", dim, q.size(dim));
  }
}

}  // namespace

// positions int64 [N], counted from 0 → cos, sin float32 [N, rotary_dim / 2] of
// position × base^(−2i / rotary_dim).
std::tuple<Tensor, Tensor> rotary_table(const Tensor& positions, int64_t rotary_dim, double base) {
  check_contiguous(positions, "positions", 1, ScalarType::Long);
  STD_TORCH_CHECK(rotary_dim >= 0 && rotary_dim % 2 == 0, "rotary_dim must be even, not ",
                  rotary_dim);
  const int64_t tokens = positions.size(0), pairs = rotary_dim / 2;
  Tensor cos = torch::stable::new_empty(positions, {tokens, pairs}, ScalarType::Float);
  Tensor sin = torch::stable::new_empty(positions, {tokens, pairs}, ScalarType::Float);
  const int64_t* position = positions.const_data_ptr<int64_t>();
  float* c = cos.mutable_data_ptr<float>();
  float* s = sin.mutable_data_ptr<float>();
  std::vector<double> frequency(pairs);
  for (int64_t i = 0; i < pairs; ++i) frequency[i] = std::pow(base, -2.0 * i / rotary_dim);
  for_each_task(tokens, grain_size(kAnglesPerThread, pairs), [&](int64_t t) {
    for (int64_t i = 0; i < pairs; ++i) {
      const double angle = static_cast<double>(position[t]) * frequency[i];
      c[t * pairs + i] = static_cast<float>(std::cos(angle));
      s[t * pairs + i] = static_cast<float>(std::sin(angle));
    }
  });
  return {cos, sin};
}

// q, k, v [N, H, D] with free strides but the last; positions int64 [N], counted from 0; sigma
// float64 [H]; cos, sin [N, R / 2] → contiguous [N, H, D]: rotated and normalised q and k, and
// v / (position + 1)^sigma.
std::tuple<Tensor, Tensor, Tensor> cottention_features(const Tensor& q, const Tensor& k,
                                                       const Tensor& v, const Tensor& positions,
                                                       const Tensor& sigma, const Tensor& cos,
                                                       const Tensor& sin) {
  check_heads(q, k, v);
  const int64_t tokens = q.size(0), heads = q.size(1), width = q.size(2);
  check_positions(positions, cos, sin, tokens, width);
  check_sigma(sigma, heads);
  Tensor q_out = torch::stable::new_empty(q, {tokens, heads, width});
  Tensor k_out = torch::stable::new_empty(q, {tokens, heads, width});
  Tensor v_out = torch::stable::new_empty(q, {tokens, heads, width});
  FeatureParams p =
      feature_params(head_view(q), head_view(k), head_view(v), positions, sigma, cos, sin, width);
  p.q_out = q_out.mutable_data_ptr<float>();
  p.k_out = k_out.mutable_data_ptr<float>();
  p.v_out = v_out.mutable_data_ptr<float>();
  const Kernels& table = kernels();
  for_each_task(tokens, grain_size(kFeaturesPerThread, 3 * heads * width),
                [&](int64_t token) { table.features(p, token); });
  return {q_out, k_out, v_out};
}

// x [N, C], rows any distance apart → contiguous [N, C].
Tensor gelu_new(const Tensor& x) { return each_row(x, kernels().gelu); }

Tensor gelu_erf(const Tensor& x) { return each_row(x, kernels().gelu_erf); }

Tensor elu_plus_one(const Tensor& x) { return each_row(x, kernels().elu_plus_one); }

// logits [R, N], rows any distance apart → int64 [R]: the first index of the largest element of
// each row, -1 if that is not finite or the row has a NaN.
Tensor argmax(const Tensor& logits) {
  check_rows(logits, "logits", 2);
  Tensor out = torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Long);
  const ArgmaxParams p{logits.const_data_ptr<float>(), out.mutable_data_ptr<int64_t>(),
                       logits.size(1), logits.stride(0)};
  const Kernels& table = kernels();
  for_each_task(logits.size(0), grain_size(kComparedPerThread, logits.size(1)),
                [&](int64_t row) { table.argmax(p, row); });
  return out;
}

// x [N, C], rows any distance apart; weight and bias [C]; into out [N, C].
void layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double epsilon,
                const Tensor& out) {
  check_rows(x, "x", 2);
  check_contiguous(weight, "weight", 1, ScalarType::Float);
  check_contiguous(bias, "bias", 1, ScalarType::Float);
  check_contiguous(out, "out", 2, ScalarType::Float);
  check_size(weight, "weight", 0, x.size(1));
  check_size(bias, "bias", 0, x.size(1));
  for (int64_t dim = 0; dim < 2; ++dim) check_size(out, "out", dim, x.size(dim));
  NormParams p{x.const_data_ptr<float>(), weight.const_data_ptr<float>(),
               bias.const_data_ptr<float>(), out.mutable_data_ptr<float>()};
  p.columns = x.size(1);
  p.x_stride = x.stride(0);
  p.epsilon = static_cast<float>(epsilon);
  const Kernels& table = kernels();
  for_each_task(x.size(0), grain_size(kNormsPerThread, x.size(1)),
                [&](int64_t row) { table.layer_norm(p, row); });
}

}  // namespace cottention
