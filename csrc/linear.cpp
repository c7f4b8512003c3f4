// Linear layers with a fixed order of summation on the CPU: packing of weights, checks and calls.
//
// Packed layout [panels, words, 64]: panel i has the output columns 64 i to 64 i + 63 side by side
// for each 32-bit word of channels, padded with zeros. A word is one float32 channel or two
// bfloat16 channels; the tensor is [panels, C, 64] or [panels, C / 2, 128]. The latter as int16 says
// that these are float32 weights, for x in float32, which lose nothing in bfloat16; C is even.
// Compressed bfloat16 weights are uint8 [panels, bytes] (compressed.h), or int32
// [panels, bytes / 4], which says that these are float32 weights.
// Weights of eight bits, as int8 [panels, groups * kGroupWords, 256], have a word of scales before
// the words of each kGroup channels (eight_bits.h).
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "checks.h"
#include "large_pages.h"
#include "ops.h"
#include "parallel.h"

namespace cottention {
namespace {

constexpr int64_t kConvertedPerThread = 65536;
constexpr int64_t kWordsBetween = 16;  // padding: rows a power of two apart share cache sets
constexpr int64_t kPackedAtOnce = 16;  // words: one or two cache lines of each row of a panel

// An unpacked weight: rows of float, or of the bits of bfloat16, `stride` apart.
template <class Element>
struct Unpacked {
  static constexpr int64_t kPerWord = sizeof(float) / sizeof(Element);
  const Element* data;
  int64_t stride, columns, channels;

  int64_t words() const { return ceil_div(channels, kPerWord); }
  Element at(int64_t column, int64_t channel) const {
    return column < columns && channel < channels ? data[column * stride + channel] : Element{};
  }
};

template <class Element>
void pack_panel(const Unpacked<Element>& weight, int64_t panel, Element* packed) {
  const int64_t each = weight.kPerWord;
  for (int64_t w0 = 0; w0 < weight.words(); w0 += kPackedAtOnce) {
    const int64_t end = std::min(w0 + kPackedAtOnce, weight.words());
    for (int64_t j = 0; j < kPanel; ++j)
      for (int64_t c = w0 * each; c < end * each; ++c)
        packed[(c / each * kPanel + j) * each + c % each] = weight.at(panel * kPanel + j, c);
  }
}

// Packed weights, written by fill(data).
template <class Fill>
Tensor filled(const Tensor& weight, int64_t panels, int64_t words, int64_t width, ScalarType type,
              const Fill& fill) {
  Tensor packed = torch::stable::new_empty(weight, {panels, words, width}, type);
  void* data = packed.mutable_data_ptr();
  fill_large_pages(data, panels * words * kPanel * sizeof(float), [&] { fill(data); });
  return packed;
}

template <class Element>
Tensor pack(const Tensor& weight) {
  const auto* data = static_cast<const Element*>(weight.const_data_ptr());
  const Unpacked<Element> from{data, weight.stride(0), weight.size(0), weight.size(1)};
  const int64_t panels = ceil_div(from.columns, kPanel), width = kPanel * from.kPerWord;
  return filled(weight, panels, from.words(), width, weight.scalar_type(), [&](void* packed) {
    auto* to = static_cast<Element*>(packed);
    for_each_task(panels, 1, [&](int64_t i) { pack_panel(from, i, to + i * from.words() * width); });
  });
}

void check_bias(const std::optional<Tensor>& bias, int64_t columns) {
  if (!bias) return;
  check_contiguous(*bias, "bias", 1, ScalarType::Float);
  check_size(*bias, "bias", 0, columns);
}

// Words of a panel for so many channels.
int64_t words_of(ScalarType type, int64_t channels) {
  switch (type) {
    case ScalarType::BFloat16:
    case ScalarType::Short:
    case ScalarType::Byte:
    case ScalarType::Int:
      return ceil_div(channels, 2);
    case ScalarType::Char:
      return ceil_div(channels, kGroup) * kGroupWords;
    default:
      return channels;
  }
}

bool is_compressed(ScalarType type) {
  return type == ScalarType::Byte || type == ScalarType::Int;
}

void check_compressed(const Tensor& packed, int64_t words) {
  check_contiguous(packed, "packed", 2, packed.scalar_type());
  if (packed.size(0) == 0) return;
  const auto element = int64_t(packed.element_size());
  STD_TORCH_CHECK(packed.size(1) * element >= int64_t(sizeof(CompressedHeader)),
                  "packed has no header");
  const auto* header = static_cast<const CompressedHeader*>(packed.const_data_ptr());
  check_size(packed, "packed", 1, compressed_bytes(words, header->capacity) / element);
}

void check_words(const Tensor& packed, int64_t words) {
  const ScalarType type = packed.scalar_type();
  const bool is_known = type == ScalarType::BFloat16 || type == ScalarType::Short ||
                        type == ScalarType::Char;
  check_contiguous(packed, "packed", 3, is_known ? type : ScalarType::Float);
  check_size(packed, "packed", 1, words);
  check_size(packed, "packed", 2, kPanel * int64_t(sizeof(float) / packed.element_size()));
}

void check_packed(const Tensor& packed, int64_t channels, int64_t words) {
  const ScalarType type = packed.scalar_type();
  is_compressed(type) ? check_compressed(packed, words) : check_words(packed, words);
  const bool takes_pairs = type == ScalarType::Short || type == ScalarType::Int;
  STD_TORCH_CHECK(!takes_pairs || channels % 2 == 0,
                  "packed as int16 or int32 takes an even number of channels, not ", channels);
}

LinearParams params(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                    const Tensor& out) {
  check_rows(x, "x", 2);
  check_contiguous(out, "out", 2, ScalarType::Float);
  check_size(out, "out", 0, x.size(0));
  check_bias(bias, out.size(1));
  const int64_t words = words_of(packed.scalar_type(), x.size(1));
  check_packed(packed, x.size(1), words);
  check_size(packed, "packed", 0, ceil_div(out.size(1), kPanel));
  LinearParams p{x.const_data_ptr<float>(), static_cast<const float*>(packed.const_data_ptr())};
  p.prefetches = prefetches_ahead();
  p.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  p.out = out.mutable_data_ptr<float>();
  p.rows = x.size(0);
  p.words = words;
  p.task_rows = is_compressed(packed.scalar_type()) ? kCompressedTaskRows : kTaskRows;
  p.panel_stride = packed.stride(0) * packed.element_size() / int64_t(sizeof(float));
  p.columns = out.size(1);
  p.x_stride = x.stride(0);
  return p;
}

// What a product does with packed weights of some type.
struct Kernel {
  void (*product)(const LinearParams&, int64_t);
  void (*convert)(const ConvertRowParams&, int64_t);  // of a row; null: x is taken as it is
  int64_t channels, words;                            // converted channels take as many words
};

Kernel kernel_for(ScalarType type) {
  const Kernels& table = kernels();
  switch (type) {
    case ScalarType::Float:
      return {table.linear, nullptr, 0, 0};
    case ScalarType::BFloat16:
      return {table.linear_bfloat16, table.to_bfloat16, 2, table.bfloat16_row_words};
    case ScalarType::Byte:
      return {table.linear_compressed, table.to_bfloat16, 2, table.bfloat16_row_words};
    case ScalarType::Int:
      return {table.linear_compressed_widened, nullptr, 0, 0};
    case ScalarType::Char:
      return {table.linear_int8, table.to_int8, kGroup, table.int8_row_words};
    default:
      return {table.linear_widened, nullptr, 0, 0};
  }
}

// A product with its kernel; its tasks are the next after those of the products before it.
struct Product {
  LinearParams p;
  Kernel kernel;
  int64_t first_task, channels;

  int64_t tasks() const { return p.panels() * p.blocks(); }
  int64_t row_words() const {
    return kernel.convert ? ceil_div(channels, kernel.channels) * kernel.words + kWordsBetween : 0;
  }
};

// Converts all rows once for all panels; the buffer is kept for the next call.
void convert_rows(std::vector<Product>& products) {
  static thread_local std::vector<float> buffer;
  size_t size = 0;
  for (const Product& each : products) size += each.p.rows * each.row_words();
  if (size > buffer.size()) buffer.resize(size);
  float* words = buffer.data();
  for (Product& each : products) {
    if (!each.kernel.convert) continue;
    LinearParams& p = each.p;
    const ConvertRowParams conversion{p.x, words, each.channels, p.x_stride, each.row_words()};
    for_each_task(p.rows, kConvertedPerThread / std::max<int64_t>(1, each.channels),
                  [&](int64_t row) { each.kernel.convert(conversion, row); });
    p.x = words;
    p.x_stride = conversion.words_stride;
    words += p.rows * p.x_stride;
  }
}

// All products as the tasks of one list, which the threads share.
void run(std::vector<Product> products) {
  convert_rows(products);
  int64_t tasks = 0, work = 0;
  for (Product& each : products) {
    const LinearParams& p = each.p;
    each.first_task = tasks;
    tasks += each.tasks();
    work += each.tasks() * std::min(p.rows, p.task_rows) * kPanel * p.words;
  }
  const int64_t mean = std::max<int64_t>(1, work / std::max<int64_t>(1, tasks));
  for_each_task(tasks, kProductsPerThread / mean, [&](int64_t task) {
    const Product* each = &products.back();
    while (task < each->first_task) --each;
    each->kernel.product(each->p, task - each->first_task);
  });
}

Product product(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                const Tensor& out) {
  return {params(x, packed, bias, out), kernel_for(packed.scalar_type()), 0, x.size(1)};
}

}  // namespace

// weight [out_features, C], float32 or bfloat16 → packed, of the same type.
Tensor pack_weight(const Tensor& weight) {
  if (weight.scalar_type() == ScalarType::BFloat16) {
    check_rows(weight, "weight", 2, ScalarType::BFloat16);
    return pack<uint16_t>(weight);
  }
  check_rows(weight, "weight", 2);
  return pack<float>(weight);
}

// weight [out_features, C], float32 → packed in eight bits.
Tensor quantize_weight(const Tensor& weight) {
  check_rows(weight, "weight", 2);
  QuantizeParams p{weight.const_data_ptr<float>()};
  p.columns = weight.size(0);
  p.channels = weight.size(1);
  p.stride = weight.stride(0);
  const int64_t panels = ceil_div(p.columns, kPanel);
  const int64_t words = ceil_div(p.channels, kGroup) * kGroupWords;
  return filled(weight, panels, words, kPanel * 4, ScalarType::Char, [&](void* packed) {
    p.packed = static_cast<float*>(packed);
    for_each_task(panels, 1, [&](int64_t panel) { kernels().quantize_panel(p, panel); });
  });
}

// x [N, C] (rows any distance apart), packed, bias [out_features] or none → [N, out_features].
Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
              int64_t out_features) {
  check_rows(x, "x", 2);
  Tensor out = torch::stable::new_empty(x, {x.size(0), out_features});
  linear_out(x, packed, bias, out);
  return out;
}

// As linear, written to out [N, out_features].
void linear_out(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                const Tensor& out) {
  run({product(x, packed, bias, out)});
}

// As linear, added to out [N, out_features].
void linear_add(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                const Tensor& out) {
  Product added = product(x, packed, bias, out);
  added.p.adds = true;
  run({added});
}

// As linear_out for each, at once. None takes what another gives.
void linear_out_all(const std::vector<LinearCall>& calls) {
  std::vector<Product> products;
  for (const LinearCall& each : calls)
    products.push_back(product(each.x, each.packed, each.bias, each.out));
  run(std::move(products));
}

}  // namespace cottention
