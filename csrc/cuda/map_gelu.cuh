// The feature maps besides Cottention's, and beside them the MLP's gelu, as the code of one CUDA
// thread. A host compiler takes it as well.
//
// A block has one head of one token: its threads rotate the query and the key into memory that they
// share, multiply both by the rows of a projection where the map has one, and write the features.
#pragma once

#include "features_gelu.cuh"

namespace cottention::cuda {

constexpr int kMaxHeadWidth = 256, kMaxFeatures = 512;
constexpr float kLeastExponent = -70.0f, kGreatestExponent = 60.0f;  // of Performer's keys

// What the threads of a block share.
struct MapShared {
  alignas(16) float x[2][kMaxHeadWidth];  // the query and the key, rotated
  float products[2][kMaxFeatures];        // of both, with the rows of the projection
  float gate[kThreads];                   // parts of the gate's product
};

COTTENTION_HD float elu_plus_one(float x) { return x > 0.0f ? x + 1.0f : expf(x); }
COTTENTION_HD float relu(float x) { return x > 0.0f ? x : 0.0f; }

// T is the type of q, k and v. There is a barrier after each of read, project and write.
template <class T>
struct MapThread {
  int thread;
  int64_t token;
  int head;

  COTTENTION_HD MapThread(const MapParams& p, int64_t block, int index)
      : thread(index), token(block / p.heads), head(int(block % p.heads)) {}

  COTTENTION_HD const T* input(const View& x) const {
    return static_cast<const T*>(x.data) + token * x.token_stride + head * x.head_stride;
  }

  COTTENTION_HD void read(const MapParams& p, MapShared& shared) const {
    for (int side = 0; side < 2; ++side) {
      const T* from = input(side ? p.k : p.q);
      for (int pair = thread; 2 * pair < p.width; pair += kThreads) {
        const float a = float(from[2 * pair]), b = float(from[2 * pair + 1]);
        const bool turns = pair < p.pairs;
        const float cos = turns ? p.cos[token * p.pairs + pair] : 1.0f;
        const float sin = turns ? p.sin[token * p.pairs + pair] : 0.0f;
        shared.x[side][2 * pair] = a * cos - b * sin;
        shared.x[side][2 * pair + 1] = b * cos + a * sin;
      }
    }
    if (!p.normed) return;
    const float *x = p.normed + token * p.channels, *w = p.gate_weight + int64_t(head) * p.channels;
    float sum = 0.0f;
    for (int channel = thread; channel < p.channels; channel += kThreads)
      sum += x[channel] * w[channel];
    shared.gate[thread] = sum;
  }

  COTTENTION_HD void project(const MapParams& p, MapShared& shared) const {
    for (int feature = thread; feature < p.features; feature += kThreads) {
      const float* row = p.projection + head * p.projection_stride + int64_t(feature) * p.width;
      float sums[2] = {0.0f, 0.0f};
      for (int column = 0; column < p.width; column += 4) {
        const Quad weight = load_input(row + column, true);
        COTTENTION_UNROLL
        for (int side = 0; side < 2; ++side) {
          COTTENTION_UNROLL
          for (int i = 0; i < 4; ++i) sums[side] += weight.x[i] * shared.x[side][column + i];
        }
      }
      shared.products[0][feature] = sums[0];
      shared.products[1][feature] = sums[1];
    }
  }

  COTTENTION_HD void write(const MapParams& p, const MapShared& shared) const {
    const int64_t row = token * p.heads + head;
    for (int side = 0; side < 2; ++side) {
      float* to = (side ? p.k_out : p.q_out) + row * p.key_width;
      if (p.map == Map::kPerformer)
        write_exponentials(p, shared, side, to);
      else if (p.map == Map::kFourier)
        write_waves(p, shared, side, to);
      else
        write_elements(p, shared.x[side], to);
    }
    const float kept = p.normed ? gate(p, shared) : 0.0f;
    const T* v = input(p.v);
    for (int i = thread; i < p.value_width; i += kThreads) {
      const float value = i < p.width ? float(v[i]) : i == p.width ? 1.0f : 0.0f;
      p.v_out[row * p.value_width + i] = p.normed ? (1.0f - kept) * value : value;
    }
    if (p.normed && thread == 0) p.gate_out[row] = kept;
  }

 private:
  COTTENTION_HD void write_elements(const MapParams& p, const float* x, float* to) const {
    for (int i = thread; i < p.width; i += kThreads) {
      if (p.map == Map::kLinear) {
        to[i] = elu_plus_one(x[i]);
      } else {
        to[i] = relu(x[i]) * p.table[2 * token];
        to[p.width + i] = relu(x[i]) * p.table[2 * token + 1];
      }
    }
  }

  COTTENTION_HD static float sum_of_squares(const MapParams& p, const float* x) {
    float sum = 0.0f;
    for (int i = 0; i < p.width; ++i) sum += x[i] * x[i];
    return sum;
  }

  // exp of the products less half the square of the scaled key, or less the query's largest.
  COTTENTION_HD void write_exponentials(const MapParams& p, const MapShared& shared, int side,
                                        float* to) const {
    const float root = sqrtf(float(p.width)), scale = 1.0f / sqrtf(root);
    const float* products = shared.products[side];
    float less = 0.0f;
    if (side) {
      less = sum_of_squares(p, shared.x[1]) / root / 2.0f;
    } else {
      less = products[0];
      for (int i = 1; i < p.features; ++i) less = products[i] > less ? products[i] : less;
      less *= scale;
    }
    const float below = sqrtf(float(p.features));
    for (int i = thread; i < p.features; i += kThreads) {
      float exponent = products[i] * scale - less;
      if (side) exponent = fminf(fmaxf(exponent, kLeastExponent), kGreatestExponent);
      to[i] = expf(exponent) / below;
    }
  }

  // Sine and cosine of the products with the input at unit length.
  COTTENTION_HD void write_waves(const MapParams& p, const MapShared& shared, int side,
                                 float* to) const {
    const float length = norm(sum_of_squares(p, shared.x[side]));
    const float below = sqrtf(float(p.features));
    for (int i = thread; i < p.features; i += kThreads) {
      const float angle = shared.products[side][i] / length;
      to[i] = sinf(angle) / below;
      to[p.features + i] = cosf(angle) / below;
    }
  }

  COTTENTION_HD float gate(const MapParams& p, const MapShared& shared) const {
    float sum = 0.0f;
    for (int i = 0; i < kThreads; ++i) sum += shared.gate[i];
    return 1.0f / (1.0f + expf(-(sum + p.gate_bias[head])));
  }
};

// The work of a block that maps.
template <class Team>
COTTENTION_HD void run_map_block(const MapParams& p, MapShared& shared, Team& team) {
  team.each([&](auto& thread) { thread.read(p, shared); });
  if (p.features > 0) team.each([&](auto& thread) { thread.project(p, shared); });
  team.each([&](auto& thread) { thread.write(p, shared); });
}

COTTENTION_HD int64_t num_quotients(const DivideParams& p) {
  return p.tokens * p.heads * p.width;
}

// One element of the outputs: divided by the sum of the scores, which keeps a distance from 0.
template <class T>
COTTENTION_HD void divide(const DivideParams& p, int64_t index) {
  if (index >= num_quotients(p)) return;
  const int64_t column = index % p.width, head = index / p.width % p.heads;
  const int64_t token = index / p.width / p.heads;
  const float* mixed = p.mixed + (token * p.heads + head) * p.value_width;
  const float total = mixed[p.width], size = fmaxf(fabsf(total), p.floor);
  T* out = static_cast<T*>(p.out) + token * p.out_stride + head * p.width + column;
  *out = T(mixed[column] / (total < 0.0f ? -size : size));
}

}  // namespace cottention::cuda
