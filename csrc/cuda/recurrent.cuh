// The recurrence as the code of one CUDA thread: S ← S diag(w) + (S a) bᵀ + v kᵀ, out = S q, token
// after token. The plain form, without w, a and b, is compiled apart.
//
// A group of lanes covers the keys of a value row, 16 bytes a lane, and holds several rows in
// registers, so that a row of state is read once and written once whatever the length of the
// segment. The sum of a row runs over the elements of a lane first and then over the lanes,
// pairwise, at distances that halve: one order whatever the batch. Shuffles and barriers are
// methods of a `Team`; a host build replaces them by loops.
//
// Segments of many tokens are cut into pieces that run side by side. In the first pass the first
// piece of a segment is computed as a whole segment is, and those between the first and the last
// sum up what they add to the state. In the second pass a piece begins with the sum of those before
// it, and gives its outputs; the last one stores the state.
#pragma once

#include "memory.cuh"
#include "tiling.cuh"

namespace cottention::cuda {

// row += value × key; returns total + row · query.
COTTENTION_HD float update(Quad& row, float value, const Quad& key, const Quad& query,
                           float total) {
  COTTENTION_UNROLL
  for (int i = 0; i < 4; ++i) {
    row.x[i] = fmaf(value, key.x[i], row.x[i]);
    total = fmaf(row.x[i], query.x[i], total);
  }
  return total;
}

COTTENTION_HD void add(Quad& total, const Quad& x) {
  COTTENTION_UNROLL
  for (int i = 0; i < 4; ++i) total.x[i] += x.x[i];
}

COTTENTION_HD float dot(const Quad& x, const Quad& y, float total) {
  COTTENTION_UNROLL
  for (int i = 0; i < 4; ++i) total = fmaf(x.x[i], y.x[i], total);
  return total;
}

// What all rows have in common at four keys; a decay that is absent is 1, an absent b is 0.
struct Keys {
  Quad k, q, w, b;
};

// row ← value k + (s b + w row); returns total + row · q.
COTTENTION_HD float update(Quad& row, float value, float s, const Keys& keys, float total) {
  COTTENTION_UNROLL
  for (int i = 0; i < 4; ++i) row.x[i] = fmaf(s, keys.b.x[i], row.x[i] * keys.w.x[i]);
  return update(row, value, keys.k, keys.q, total);
}

// What a thread reads of a token: its keys and queries, and a value for each of its rows.
template <class TileShape>
struct Inputs {
  Quad key[TileShape::kPieces], query[TileShape::kPieces];
  float value[TileShape::kRows];
};

// Delayed updates of a slot; the one that completes them is not among them.
COTTENTION_HD int num_delayed(const StepParams& p, int slot) {
  const int count = p.delayed.counts[slot];
  return count < 0 ? 0 : count < p.delayed.capacity ? count : p.delayed.capacity - 1;
}

// One thread of a block; In is the type of q, k, v and Out that of the outputs.
template <class In, class Out, class TileShape>
struct Thread {
  static constexpr int kSums = TileShape::kRows + 1;

  int thread, lane, group;
  int row, rows_left;  // its first value row, and the rows of the head from there on
  float *own, *own_z;  // where h, from that row and the lane's first key on, and z are stored, or null
  Quad h[TileShape::kRows][TileShape::kPieces];
  Quad z[TileShape::kPieces];
  Inputs<TileShape> now, next;
  float sums[kSums];  // of each row, and of the denominator
  float reads[TileShape::kRows];  // S a of each row

  COTTENTION_HD explicit Thread(int index)
      : thread(index), lane(index % TileShape::kLanes), group(index / TileShape::kLanes) {}

  // Rows of a thread are kGroups apart, its pieces of a row kLanes quads.
  COTTENTION_HD bool has_row(int r) const { return r * TileShape::kGroups < rows_left; }
  COTTENTION_HD int column(int i) const { return 4 * (lane + i * TileShape::kLanes); }
  COTTENTION_HD int64_t offset(const StepParams& p, int r, int i) const {
    return r * TileShape::kGroups * p.key_width + 4 * i * TileShape::kLanes;
  }
  // The state [V, K] of the task's head in row `index` of a pool, at the thread's first element.
  COTTENTION_HD float* state_in(const StepParams& p, const BlockTask& task, float* pool,
                                int64_t stride, int64_t index) const {
    return pool + index * stride + (int64_t(task.head) * p.value_width + row) * p.key_width +
           4 * lane;
  }
  COTTENTION_HD float* z_in(const StepParams& p, const BlockTask& task, float* pool, int64_t stride,
                            int64_t index) const {
    return pool + index * stride + int64_t(task.head) * p.key_width + 4 * lane;
  }
  COTTENTION_HD float* cut_state(const StepParams& p, const BlockTask& task, int piece) const {
    return state_in(p, task, p.cut_state, int64_t(p.heads) * p.value_width * p.key_width, piece);
  }
  COTTENTION_HD float* cut_z(const StepParams& p, const BlockTask& task, int piece) const {
    return z_in(p, task, p.cut_z, int64_t(p.heads) * p.key_width, piece);
  }
  COTTENTION_HD static Out* output(const StepParams& p, const BlockTask& task, int64_t token) {
    return static_cast<Out*>(p.out) + token * p.out_stride + task.head * p.value_width;
  }
  COTTENTION_HD static const In* input(const View& x, const BlockTask& task, int64_t token) {
    return static_cast<const In*>(x.data) + token * x.token_stride + task.head * x.head_stride;
  }

  // Elements outside the head are zero and stay zero.
  COTTENTION_HD void zero() {
    COTTENTION_UNROLL
    for (int r = 0; r < TileShape::kRows; ++r) COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i) h[r][i] = Quad{};
    COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i) z[i] = Quad{};
  }

  COTTENTION_HD void read_state(const StepParams& p, const float* from, const float* from_z) {
    COTTENTION_UNROLL
    for (int r = 0; r < TileShape::kRows; ++r) COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i)
      h[r][i] = has_row(r) && column(i) < p.key_width ? load_state(from + offset(p, r, i)) : Quad{};
    if (!p.z) return;
    COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i)
      z[i] = column(i) < p.key_width ? load_state(from_z + offset(p, 0, i)) : Quad{};
  }

  COTTENTION_HD void add_state(const StepParams& p, const float* from, const float* from_z) {
    COTTENTION_UNROLL
    for (int r = 0; r < TileShape::kRows; ++r) COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i)
      if (has_row(r) && column(i) < p.key_width) add(h[r][i], load_state(from + offset(p, r, i)));
    if (!p.z) return;
    COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i)
      if (column(i) < p.key_width) add(z[i], load_state(from_z + offset(p, 0, i)));
  }

  // Loads the rows of a tile, and decides where they are stored.
  template <Form kForm>
  COTTENTION_HD void load(const StepParams& p, const BlockTask& task, int tile) {
    row = tile * TileShape::kTileRows + group;
    rows_left = p.value_width - row;
    own = state_in(p, task, p.state, p.state_stride, task.slot);
    own_z = p.z ? z_in(p, task, p.z, p.z_stride, task.slot) : nullptr;
    if constexpr (kForm == Form::kLaterPieces) {
      zero();
      for (int piece = task.first_piece; piece < task.piece; ++piece)
        add_state(p, cut_state(p, task, piece), p.z ? cut_z(p, task, piece) : nullptr);
      if (!task.is_last_piece()) own = own_z = nullptr;
    } else if (kForm == Form::kFirstPieces && !task.is_first_piece()) {
      zero();
    } else {
      read_state(p, own, own_z);
    }
    if (kForm == Form::kFirstPieces && !task.is_last_piece()) {
      own = cut_state(p, task, task.piece);
      own_z = p.z ? cut_z(p, task, task.piece) : nullptr;
    }
  }

  // Reads a token's inputs into `next`.
  COTTENTION_HD void fetch(const StepParams& p, const BlockTask& task, int64_t token) {
    const In* v = input(p.v, task, token) + row;
    COTTENTION_UNROLL
    for (int r = 0; r < TileShape::kRows; ++r)
      next.value[r] = has_row(r) ? float(v[r * TileShape::kGroups]) : 0.0f;
    COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i) {
      if (column(i) >= p.key_width) break;
      next.key[i] = load_input(input(p.k, task, token) + column(i), p.is_aligned);
      next.query[i] = load_input(input(p.q, task, token) + column(i), p.is_aligned);
    }
  }
  COTTENTION_HD void take() { now = next; }

  // Keys and values of delayed update `index`, as a token's inputs; there is no query.
  COTTENTION_HD int64_t delayed_key(const StepParams& p, const BlockTask& task, int index) const {
    return task.slot * p.delayed.key_slot_stride + index * p.delayed.key_stride +
           int64_t(task.head) * p.key_width + 4 * lane;
  }
  COTTENTION_HD int64_t delayed_value(const StepParams& p, const BlockTask& task, int index) const {
    return task.slot * p.delayed.value_slot_stride + index * p.delayed.value_stride +
           int64_t(task.head) * p.value_width + row;
  }

  // Adds the slot's delayed updates to the state in the registers, in the order of their tokens.
  COTTENTION_HD void add_delayed(const StepParams& p, const BlockTask& task) {
    for (int index = 0; index < num_delayed(p, task.slot); ++index) {
      const float* keys = p.delayed.keys + delayed_key(p, task, index);
      const float* values = p.delayed.values + delayed_value(p, task, index);
      COTTENTION_UNROLL
      for (int i = 0; i < TileShape::kPieces; ++i) {
        if (column(i) >= p.key_width) break;
        const Quad key = load_state(keys + offset(p, 0, i));
        COTTENTION_UNROLL
        for (int r = 0; r < TileShape::kRows; ++r)
          if (has_row(r)) update(h[r][i], values[r * TileShape::kGroups], key, Quad{}, 0.0f);
      }
    }
  }

  // Stores the token's mapped key and value as the slot's next delayed update.
  COTTENTION_HD void append(const StepParams& p, const BlockTask& task) const {
    const int index = num_delayed(p, task.slot);
    float* keys = p.delayed.keys + delayed_key(p, task, index);
    float* values = p.delayed.values + delayed_value(p, task, index);
    COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i)
      if (task.tile == 0 && group == 0 && column(i) < p.key_width)
        store_state(keys + offset(p, 0, i), now.key[i]);
    COTTENTION_UNROLL
    for (int r = 0; r < TileShape::kRows; ++r)
      if (lane == 0 && has_row(r)) values[r * TileShape::kGroups] = now.value[r];
  }

  // Updates the state by the token taken; `sums` get this lane's part of every sum.
  COTTENTION_HD void advance(const StepParams& p) {
    COTTENTION_UNROLL
    for (int s = 0; s < kSums; ++s) sums[s] = 0.0f;
    COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i) {
      if (column(i) >= p.key_width) break;
      COTTENTION_UNROLL
      for (int r = 0; r < TileShape::kRows; ++r)
        sums[r] = update(h[r][i], now.value[r], now.key[i], now.query[i], sums[r]);
      if (p.z)
        sums[TileShape::kRows] =
            update(z[i], 1.0f, now.key[i], now.query[i], sums[TileShape::kRows]);
    }
  }

  COTTENTION_HD static const float* term(const View& x, const BlockTask& task, int64_t token) {
    return static_cast<const float*>(x.data) + token * x.token_stride + task.head * x.head_stride;
  }

  COTTENTION_HD Keys load_keys(const StepParams& p, const BlockTask& task, int64_t token,
                               int i) const {
    Keys keys{load_input(input(p.k, task, token) + column(i), p.is_aligned),
              load_input(input(p.q, task, token) + column(i), p.is_aligned),
              {{1.0f, 1.0f, 1.0f, 1.0f}},
              {}};
    if (p.decay == Decay::kPerHead) {
      const float w = *term(p.w, task, token);
      keys.w = {{w, w, w, w}};
    }
    if (p.decay == Decay::kPerKey)
      keys.w = load_input(term(p.w, task, token) + column(i), p.is_terms_aligned);
    if (p.has_term) keys.b = load_input(term(p.b, task, token) + column(i), p.is_terms_aligned);
    return keys;
  }

  // `reads` get this lane's part of S a, of the state before the token.
  COTTENTION_HD void read(const StepParams& p, const BlockTask& task, int64_t token) {
    COTTENTION_UNROLL
    for (int r = 0; r < TileShape::kRows; ++r) reads[r] = 0.0f;
    if (!p.has_term) return;
    COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i) {
      if (column(i) >= p.key_width) break;
      const Quad a = load_input(term(p.a, task, token) + column(i), p.is_terms_aligned);
      COTTENTION_UNROLL
      for (int r = 0; r < TileShape::kRows; ++r) reads[r] = dot(h[r][i], a, reads[r]);
    }
  }

  // `advance` with w, a and b; the reads must be reduced over the lanes.
  COTTENTION_HD void advance_general(const StepParams& p, const BlockTask& task, int64_t token) {
    const In* v = input(p.v, task, token) + row;
    float value[TileShape::kRows];
    COTTENTION_UNROLL
    for (int r = 0; r < TileShape::kRows; ++r)
      value[r] = has_row(r) ? float(v[r * TileShape::kGroups]) : 0.0f;
    COTTENTION_UNROLL
    for (int s = 0; s < kSums; ++s) sums[s] = 0.0f;
    COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i) {
      if (column(i) >= p.key_width) break;
      const Keys keys = load_keys(p, task, token, i);
      COTTENTION_UNROLL
      for (int r = 0; r < TileShape::kRows; ++r)
        sums[r] = update(h[r][i], value[r], reads[r], keys, sums[r]);
      if (p.z) sums[TileShape::kRows] = update(z[i], 1.0f, 0.0f, keys, sums[TileShape::kRows]);
    }
  }

  // Stores the outputs of a token; the sums must be reduced over the lanes.
  COTTENTION_HD void write(const StepParams& p, const BlockTask& task, int64_t token) {
    if (lane != 0) return;
    if (p.z) divide();
    Out* out = output(p, task, token) + row;
    COTTENTION_UNROLL
    for (int r = 0; r < TileShape::kRows; ++r)
      if (has_row(r)) out[r * TileShape::kGroups] = Out(sums[r]);
  }

  COTTENTION_HD void divide() {
    const float total = sums[TileShape::kRows];
    const float denominator = total < kDenominatorFloor ? kDenominatorFloor : total;
    COTTENTION_UNROLL
    for (int r = 0; r < TileShape::kRows; ++r) sums[r] /= denominator;
  }

  COTTENTION_HD void store(const StepParams& p) const {
    if (!own) return;
    COTTENTION_UNROLL
    for (int r = 0; r < TileShape::kRows; ++r) COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i)
      if (has_row(r) && column(i) < p.key_width) store_state(own + offset(p, r, i), h[r][i]);
  }

  // Every group of lanes holds all of z; one writes it, after all groups have read the old values.
  COTTENTION_HD void store_z(const StepParams& p) const {
    if (!own_z || group != 0) return;
    COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i)
      if (column(i) < p.key_width) store_state(own_z + offset(p, 0, i), z[i]);
  }

  // Writes zeros for a segment without a slot.
  COTTENTION_HD void clear(const StepParams& p, const BlockTask& task) const {
    const int end = min(task.tile_end * TileShape::kTileRows, p.value_width);
    for (int64_t t = task.first; t < task.last; ++t)
      for (int i = task.tile * TileShape::kTileRows + thread; i < end; i += kThreads)
        output(p, task, t)[i] = Out(0.0f);
  }
};

// Whether inputs of the next token are read while one is computed. Wide keys leave no registers.
template <class TileShape, Form kForm>
constexpr bool kFetchesAhead = kForm != Form::kDecode && TileShape::kPieces <= 2;

// The tokens of a tile whose rows are loaded.
template <class TileShape, Form kForm, class Team>
COTTENTION_HD void advance_tokens(const StepParams& p, const BlockTask& task, Team& team) {
  constexpr bool kAhead = kFetchesAhead<TileShape, kForm>;
  const bool has_outputs = kForm != Form::kFirstPieces || task.is_first_piece();
  if (kAhead) team.fetch(p, task, task.first);
  for (int64_t t = task.first; t < task.last; ++t) {
    if (!kAhead) team.fetch(p, task, t);
    team.take();
    if (kAhead && t + 1 < task.last) team.fetch(p, task, t + 1);
    team.advance(p);
    if (!has_outputs) continue;
    team.reduce();
    team.write(p, task, t);
  }
}

// `advance_tokens` with w, a and b.
template <class Team>
COTTENTION_HD void advance_general_tokens(const StepParams& p, const BlockTask& task, Team& team) {
  for (int64_t t = task.first; t < task.last; ++t) {
    team.read(p, task, t);
    team.reduce_reads();
    team.advance_general(p, task, t);
    team.reduce();
    team.write(p, task, t);
  }
}

// The work of a block. A Team is its threads: one on a GPU, all of them in turn on a host.
template <class TileShape, Form kForm, bool kIsGeneral, class Team>
COTTENTION_HD void run_block(const StepParams& p, uint32_t block, Team& team) {
  const BlockTask task = block_task<TileShape, kForm>(p, block);
  if (!task.is_active || task.first >= task.last) {
    team.await_inputs();
    if (kForm == Form::kDecode || task.first < task.last) team.clear(p, task);
    return;
  }
  for (int tile = task.tile; tile < task.tile_end; ++tile) {
    team.template load<kForm>(p, task, tile);
    team.await_inputs();  // what comes before reads no inputs
    if constexpr (kIsGeneral)
      advance_general_tokens(p, task, team);
    else
      advance_tokens<TileShape, kForm>(p, task, team);
    team.store(p);
  }
  if (p.z) team.sync_and_store_z(p);
}

// The work of a block that writes delayed updates to the state; segments are slots.
template <class TileShape, class Team>
COTTENTION_HD void run_fold_block(const StepParams& p, uint32_t block, Team& team) {
  const BlockTask task = block_task<TileShape, Form::kDecode>(p, block);
  if (!task.is_active || num_delayed(p, task.slot) == 0) return;
  team.template load<Form::kDecode>(p, task, task.tile);
  team.add_delayed(p, task);
  team.store(p);
}

}  // namespace cottention::cuda
