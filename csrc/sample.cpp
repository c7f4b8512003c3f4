// draw on the CPU: an id by chance for each row, after temperature, min_p, top_k and top_p.
//
// Owns the choice of ids and of one among them. What an id weighs is weigh.h's. Ids of one weight
// stand in their own order. Sums are taken in float64, in which weights hardly round.
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

constexpr int64_t kWeighedPerThread = 4096;

struct Wish {
  double uniform, temperature, min_p, top_k, top_p;
};
constexpr int64_t kWishes = sizeof(Wish) / sizeof(double);

// An id that may be drawn. Heat makes weights equal whose logits are not: these say who is first.
struct Candidate {
  float logit, weight;
  int32_t id;
};

bool is_before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// Ids of about one weight: those whose exponent and first three bits of mantissa are the same. The
// first bin has the weights 0 alone.
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

// What has been taken, the heaviest first, of what may be: `most` ids, and those that come before
// their weights reach `mass`. The first is always taken.
struct Taken {
  double most, mass;
  int64_t count = 0;
  double sum = 0.0;

  bool wants(const Bin& bin) const { return count + bin.count <= most && sum + bin.sum < mass; }
  bool wants_one() const { return count == 0 || (count < most && sum < mass); }
  void take(const Bin& bin) {
    count += bin.count;
    sum += bin.sum;
  }
};

// What may be drawn in a row, in the order of ids. A thread keeps the memory for its next row.
class Candidates {
 public:
  // Of all ids of a row, with room for their weights.
  float* reset(const float* logits, int64_t count) {
    logits_ = logits;
    weights_.resize(count);
    ids_.resize(count);
    std::iota(ids_.begin(), ids_.end(), 0);
    return weights_.data();
  }

  double sum() const { return sum_of(weights_); }

  // Leaves the heaviest alone, so many and of such a mass: whole bins, and the first of the next.
  void keep_first(double most, double mass) {
    Taken taken{most, mass};
    const Bins bins = bins_of(weights_);
    int at = bins.size() - 1;
    for (; at > 0 && taken.wants(bins[at]); --at) taken.take(bins[at]);
    if (at > 0) cut(at, last_of(at, taken));
  }

  // The id at which the sum of the weights, in order of ids, passes that part of the whole.
  int64_t pick(double uniform) const {
    const double total = sum();
    const double below = std::min(uniform * total, std::nextafter(total, 0.0));  // rounding
    double passed = 0.0;
    size_t place = 0;
    while ((passed += weights_[place]) <= below && place + 1 < weights_.size()) ++place;
    return ids_[place];
  }

 private:
  // The last of a bin that is still wanted; what comes before all of it if none is.
  Candidate last_of(int at, Taken& taken) {
    edge_.clear();
    for (size_t i = 0; i < weights_.size(); ++i)
      if (bin_of(weights_[i]) == at) edge_.push_back(candidate(i));
    std::sort(edge_.begin(), edge_.end(), is_before);
    Candidate last{std::numeric_limits<float>::infinity(), 0.0f, 0};
    for (size_t i = 0; i < edge_.size() && taken.wants_one(); ++i) {
      last = edge_[i];
      taken.take({1, last.weight});
    }
    return last;
  }

  // Leaves those up to the last, which is in this bin or before it.
  void cut(int at, const Candidate& last) {
    size_t stay = 0;
    for (size_t i = 0; i < weights_.size(); ++i) {
      const Candidate one = candidate(i);
      weights_[stay] = one.weight;
      ids_[stay] = one.id;
      const int bin = bin_of(one.weight);
      stay += bin > at || (bin == at && !is_before(last, one));
    }
    weights_.resize(stay);
    ids_.resize(stay);
  }

  Candidate candidate(size_t place) const {
    return {logits_[ids_[place]], weights_[place], ids_[place]};
  }

  const float* logits_ = nullptr;
  std::vector<float> weights_;
  std::vector<int32_t> ids_;
  std::vector<Candidate> edge_;
};

int64_t draw_one(WeighParams p, const Wish& wish, Candidates& candidates) {
  constexpr double kInfinite = std::numeric_limits<double>::infinity();
  using Float = std::numeric_limits<float>;
  p.temperature =
      static_cast<float>(std::clamp<double>(wish.temperature, Float::min(), Float::max()));
  p.least = static_cast<float>(wish.min_p);
  p.out = candidates.reset(p.x, p.columns);
  kernels().weigh(p);
  if (wish.top_k > 0) candidates.keep_first(wish.top_k, kInfinite);
  if (wish.top_p < 1) candidates.keep_first(kInfinite, wish.top_p * candidates.sum());
  return candidates.pick(wish.uniform);
}

}  // namespace

// logits [R, N], rows any distance apart; likeliest int64 [R], the place of each row's largest, or
// negative: then the row gets that; wishes float64 [R, 5]: a number in [0, 1), temperature, min_p,
// top_k, top_p. Temperature 0 wants the likeliest. → int64 [R].
Tensor draw(const Tensor& logits, const Tensor& likeliest, const Tensor& wishes) {
  check_rows(logits, "logits", 2);
  check_contiguous(likeliest, "likeliest", 1, ScalarType::Long);
  check_contiguous(wishes, "wishes", 2, ScalarType::Double);
  const int64_t rows = logits.size(0), columns = logits.size(1);
  check_size(likeliest, "likeliest", 0, rows);
  check_size(wishes, "wishes", 0, rows);
  check_size(wishes, "wishes", 1, kWishes);
  Tensor out = torch::stable::new_empty(likeliest, {rows});
  const float* x = logits.const_data_ptr<float>();
  const int64_t* best = likeliest.const_data_ptr<int64_t>();
  const auto* wish = reinterpret_cast<const Wish*>(wishes.const_data_ptr<double>());
  int64_t* id = out.mutable_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; ++row)
    STD_TORCH_CHECK(best[row] < columns, "likeliest of row ", row, " is out of range");
  for_each_task(rows, ceil_div(kWeighedPerThread, std::max<int64_t>(1, columns)), [&](int64_t row) {
    thread_local Candidates candidates;
    id[row] = best[row];
    if (best[row] < 0 || wish[row].temperature == 0.0) return;
    WeighParams p{x + row * logits.stride(0)};
    p.columns = columns;
    p.best = p.x[best[row]];
    id[row] = draw_one(p, wish[row], candidates);
  });
  return out;
}

}  // namespace cottention
