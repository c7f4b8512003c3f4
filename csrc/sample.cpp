// sample on the CPU: a random token id for each row of logits, after temperature, min_p, top_k and
// top_p; and apply_token_bitmask, which leaves only the ids of a packed mask.
//
// The weights of ids (unnormalised probabilities) are computed in sampling_weights.h; here the ids
// that top_k and top_p keep are selected, and one is drawn by inverting the cumulative sum. Ids of
// equal logit are ordered by id. Sums are float64, so that rounding hardly matters.
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "checks.h"
#include "ops.h"
#include "parallel.h"

namespace cottention {
namespace {

constexpr int64_t kLogitsPerThread = 4096;
constexpr int64_t kMaskedPerThread = 65536;
constexpr int64_t kWordBits = 32;

struct SamplingRow {
  double uniform, temperature, min_p, top_k, top_p;
};
constexpr int64_t kSamplingValues = sizeof(SamplingRow) / sizeof(double);

// An id that may be sampled. At high temperatures unequal logits have equal weights, so candidates
// are ordered by logit.
struct Candidate {
  float logit, weight;
  int32_t id;
};

bool is_before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// A histogram bin of weights: those with the same exponent and first three bits of the mantissa.
// Bin 0 has the weights of 0 alone.
struct Bin {
  int64_t count;
  double sum;
};
constexpr int kBinShift = 20;
using Bins = std::array<Bin, (0x3f800000 >> kBinShift) + 1>;  // weights from 0 to 1

int bin_of(float weight) {
  uint32_t bits;
  std::memcpy(&bits, &weight, sizeof bits);
  return static_cast<int>(bits >> kBinShift);
}

Bins bins_of(const std::vector<float>& weights) {
  Bins bins{};
  for (const float weight : weights) {
    Bin& bin = bins[bin_of(weight)];
    ++bin.count;
    bin.sum += weight;
  }
  return bins;
}

double sum_of(const std::vector<float>& weights) {
  double sum = 0.0;
  for (const float weight : weights) sum += weight;
  return sum;
}

// The ids kept so far, the likeliest first: at most `max_count`, and only until the sum of their
// weights reaches `max_sum`. The first is always kept.
struct Kept {
  double max_count, max_sum;
  int64_t count = 0;
  double sum = 0.0;

  bool has_room_for(const Bin& bin) const {
    return count + bin.count <= max_count && sum + bin.sum < max_sum;
  }
  bool has_room() const { return count == 0 || (count < max_count && sum < max_sum); }
  void add(const Bin& bin) {
    count += bin.count;
    sum += bin.sum;
  }
};

// The ids of a row that may be sampled, in ascending order. A thread reuses the memory for its next
// row.
class Candidates {
 public:
  // Starts with all ids of a row; returns the buffer for their weights.
  float* reset(const float* logits, int64_t count) {
    logits_ = logits;
    weights_.resize(count);
    ids_.resize(count);
    std::iota(ids_.begin(), ids_.end(), 0);
    return weights_.data();
  }

  double sum() const { return sum_of(weights_); }

  // Keeps the likeliest ids, `max_count` at most and until their weights sum to `max_sum`: whole
  // bins, then the likeliest of the next bin.
  void keep_likeliest(double max_count, double max_sum) {
    Kept kept{max_count, max_sum};
    const Bins bins = bins_of(weights_);
    int bin = bins.size() - 1;
    for (; bin > 0 && kept.has_room_for(bins[bin]); --bin) kept.add(bins[bin]);
    if (bin > 0) cut(bin, last_of(bin, kept));
  }

  // The first id at which the cumulative sum of weights, in id order, exceeds uniform × total.
  int64_t pick(double uniform) const {
    const double total = sum();
    const double last = std::nextafter(total, 0.0);  // uniform * total may round to total
    const double threshold = std::min(uniform * total, last);
    double cumulative = 0.0;
    size_t index = 0;
    while ((cumulative += weights_[index]) <= threshold && index + 1 < weights_.size()) ++index;
    return ids_[index];
  }

 private:
  // The last candidate of a bin that is kept; one that precedes the whole bin if none is.
  Candidate last_of(int bin, Kept& kept) {
    edge_.clear();
    for (size_t i = 0; i < weights_.size(); ++i)
      if (bin_of(weights_[i]) == bin) edge_.push_back(candidate(i));
    std::sort(edge_.begin(), edge_.end(), is_before);
    Candidate last{std::numeric_limits<float>::infinity(), 0.0f, 0};
    for (size_t i = 0; i < edge_.size() && kept.has_room(); ++i) {
      last = edge_[i];
      kept.add({1, last.weight});
    }
    return last;
  }

  // Removes the candidates behind `last`, which is in bin `last_bin` or precedes it.
  void cut(int last_bin, const Candidate& last) {
    size_t num_kept = 0;
    for (size_t i = 0; i < weights_.size(); ++i) {
      const Candidate one = candidate(i);
      weights_[num_kept] = one.weight;
      ids_[num_kept] = one.id;
      const int bin = bin_of(one.weight);
      num_kept += bin > last_bin || (bin == last_bin && !is_before(last, one));
    }
    weights_.resize(num_kept);
    ids_.resize(num_kept);
  }

  Candidate candidate(size_t index) const {
    return {logits_[ids_[index]], weights_[index], ids_[index]};
  }

  const float* logits_ = nullptr;
  std::vector<float> weights_;
  std::vector<int32_t> ids_;
  std::vector<Candidate> edge_;
};

int64_t sample_one(SamplingWeightsParams p, const SamplingRow& params, Candidates& candidates) {
  constexpr double kInfinite = std::numeric_limits<double>::infinity();
  using Float = std::numeric_limits<float>;
  p.temperature =
      static_cast<float>(std::clamp<double>(params.temperature, Float::min(), Float::max()));
  p.min_p = static_cast<float>(params.min_p);
  p.out = candidates.reset(p.x, p.columns);
  kernels().sampling_weights(p);
  if (params.top_k > 0) candidates.keep_likeliest(params.top_k, kInfinite);
  if (params.top_p < 1) candidates.keep_likeliest(kInfinite, params.top_p * candidates.sum());
  return candidates.pick(params.uniform);
}

// Logits of a word's ids: those whose bit is not set become -inf.
void mask_word(float* x, int64_t count, uint32_t bits) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  if (bits == 0) {
    std::fill(x, x + count, kNever);
  } else if (bits != ~uint32_t{0}) {
    for (int64_t bit = 0; bit < count; ++bit) x[bit] = bits >> bit & 1 ? x[bit] : kNever;
  }
}

}  // namespace

// logits [R, N], rows any distance apart, changed in place; bitmask int32 [M, W]; rows and places
// int64 [B]: row rows[b] keeps its logits where bit i % 32 of word i / 32 of bitmask[places[b]] is
// set, and gets -inf elsewhere, below 32 W.
void apply_token_bitmask(const Tensor& logits, const Tensor& rows, const Tensor& bitmask,
                         const Tensor& places) {
  check_rows(logits, "logits", 2);
  check_contiguous(rows, "rows", 1, ScalarType::Long);
  check_contiguous(bitmask, "bitmask", 2, ScalarType::Int);
  check_contiguous(places, "places", 1, ScalarType::Long);
  const int64_t count = rows.size(0), words = bitmask.size(1);
  check_size(places, "places", 0, count);
  const int64_t* row = rows.const_data_ptr<int64_t>();
  const int64_t* place = places.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(row[i] >= 0 && row[i] < logits.size(0), "row ", row[i], " is out of range");
    STD_TORCH_CHECK(place[i] >= 0 && place[i] < bitmask.size(0), "place ", place[i],
                    " is out of range");
  }
  float* x = logits.mutable_data_ptr<float>();
  const int32_t* bits = bitmask.const_data_ptr<int32_t>();
  const int64_t columns = std::min(logits.size(1), kWordBits * words);
  for_each_task(count, ceil_div(kMaskedPerThread, std::max<int64_t>(1, columns)), [&](int64_t i) {
    float* first = x + row[i] * logits.stride(0);
    const int32_t* word = bits + place[i] * words;
    for (int64_t start = 0; start < columns; start += kWordBits, ++word)
      mask_word(first + start, std::min(kWordBits, columns - start), *word);
  });
}

// logits [R, N], rows any distance apart; argmax int64 [R], the index of each row's largest logit;
// sampling_rows float64 [R, 5]: a random number in [0, 1), temperature, min_p, top_k, top_p →
// int64 [R]. A row gets its argmax where that is negative or the temperature is 0.
Tensor sample(const Tensor& logits, const Tensor& argmax, const Tensor& sampling_rows) {
  check_rows(logits, "logits", 2);
  check_contiguous(argmax, "argmax", 1, ScalarType::Long);
  check_contiguous(sampling_rows, "sampling_rows", 2, ScalarType::Double);
  const int64_t rows = logits.size(0), columns = logits.size(1);
  check_size(argmax, "argmax", 0, rows);
  check_size(sampling_rows, "sampling_rows", 0, rows);
  check_size(sampling_rows, "sampling_rows", 1, kSamplingValues);
  Tensor out = torch::stable::new_empty(argmax, {rows});
  const float* x = logits.const_data_ptr<float>();
  const int64_t* best = argmax.const_data_ptr<int64_t>();
  const auto* params = reinterpret_cast<const SamplingRow*>(sampling_rows.const_data_ptr<double>());
  int64_t* id = out.mutable_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; ++row)
    STD_TORCH_CHECK(best[row] < columns, "argmax of row ", row, " is out of range");
  for_each_task(rows, ceil_div(kLogitsPerThread, std::max<int64_t>(1, columns)), [&](int64_t row) {
    thread_local Candidates candidates;
    id[row] = best[row];
    if (best[row] < 0 || params[row].temperature == 0.0) return;
    SamplingWeightsParams p{x + row * logits.stride(0)};
    p.columns = columns;
    p.max_logit = p.x[best[row]];
    id[row] = sample_one(p, params[row], candidates);
  });
  return out;
}

}  // namespace cottention
