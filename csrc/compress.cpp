// Compression of packed bfloat16 weights to the layout of compressed.h.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "checks.h"
#include "large_pages.h"
#include "ops.h"
#include "parallel.h"

namespace cottention {
namespace {

constexpr int64_t kWordWeights = 2 * kPanel;
constexpr int kCodes = 16;
constexpr int64_t kExceptionsAtOnce = 64 / sizeof(CompressedException);  // of a cache line

using Codes = std::array<int, 256>;  // of each upper byte; kCodes: it has none

struct PackedPanel {
  const uint16_t* data;
  int64_t words;
};

// The codes of a panel go to the upper bytes that it has most of.
struct Coding {
  std::array<uint8_t, kCodes> table;
  int64_t exceptions;

  static Coding of(const PackedPanel& panel) {
    std::array<int64_t, 256> counts{};
    for (int64_t i = 0; i < panel.words * kWordWeights; ++i) ++counts[panel.data[i] >> 8];
    std::array<uint8_t, 256> bytes;
    std::iota(bytes.begin(), bytes.end(), 0);
    std::stable_sort(bytes.begin(), bytes.end(),
                     [&](uint8_t a, uint8_t b) { return counts[a] > counts[b]; });
    Coding coding{};
    std::copy_n(bytes.begin(), kCodes, coding.table.begin());
    for (int i = kCodes; i < 256; ++i) coding.exceptions += counts[bytes[i]];
    return coding;
  }

  Codes codes() const {
    Codes codes;
    codes.fill(kCodes);
    for (int i = 0; i < kCodes; ++i) codes[table[i]] = i;
    return codes;
  }
};

// Writes kCompressedWord bytes and the exceptions of a word, and returns where the next one goes.
CompressedException* compress_word(const uint16_t* weights, uint32_t word, const Codes& codes,
                                   uint8_t* to, CompressedException* exception) {
  std::fill_n(to, kCompressedWord, uint8_t{});
  for (int64_t i = 0; i < kWordWeights; ++i) {
    const int code = codes[weights[i] >> 8];
    const int64_t half = i / kHalfPanel, of_half = i % kHalfPanel;
    const int64_t columns = of_half / 32, eight = of_half % 32 / 8;  // of 16 columns, 4 times 8
    const int64_t place = eight * 16 + columns * 8 + i % 8;
    to[half * kHalfPanel + place] = uint8_t(weights[i]);
    if (code < kCodes)
      to[2 * kHalfPanel + place] |= uint8_t(code << 4 * half);
    else
      *exception++ = {word, uint16_t(i), weights[i]};
  }
  return exception;
}

void compress_panel(const PackedPanel& panel, const Coding& coding, int64_t capacity, uint8_t* to) {
  CompressedHeader header{};
  std::copy(coding.table.begin(), coding.table.end(), header.table);
  header.capacity = uint32_t(capacity);
  __builtin_memcpy(to, &header, sizeof header);
  auto* exceptions = reinterpret_cast<CompressedException*>(to + sizeof header);
  std::fill_n(exceptions, capacity, CompressedException{kNoWord, 0, 0});
  auto* bytes = reinterpret_cast<uint8_t*>(exceptions + capacity);
  const Codes codes = coding.codes();
  for (int64_t w = 0; w < panel.words; ++w)
    exceptions = compress_word(panel.data + w * kWordWeights, uint32_t(w), codes,
                               bytes + w * kCompressedWord, exceptions);
}

}  // namespace

// packed [panels, words, 128], bfloat16 → the same in twelve bits each, uint8 [panels, bytes].
Tensor compress_weight(const Tensor& packed) {
  check_contiguous(packed, "packed", 3, ScalarType::BFloat16);
  check_size(packed, "packed", 2, kWordWeights);
  const int64_t panels = packed.size(0), words = packed.size(1);
  const auto* data = static_cast<const uint16_t*>(packed.const_data_ptr());
  const auto panel = [&](int64_t i) {
    return PackedPanel{data + i * words * kWordWeights, words};
  };
  std::vector<Coding> codings(panels);
  for_each_task(panels, 1, [&](int64_t i) { codings[i] = Coding::of(panel(i)); });
  int64_t most = 0;
  for (const Coding& each : codings) most = std::max(most, each.exceptions);
  const int64_t capacity = ceil_div(most + 1, kExceptionsAtOnce) * kExceptionsAtOnce;
  const int64_t bytes = compressed_bytes(words, capacity);
  Tensor out = torch::stable::new_empty(packed, {panels, bytes}, ScalarType::Byte);
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  fill_large_pages(to, panels * bytes, [&] {
    for_each_task(panels, 1, [&](int64_t i) {
      compress_panel(panel(i), codings[i], capacity, to + i * bytes);
    });
  });
  return out;
}

}  // namespace cottention
