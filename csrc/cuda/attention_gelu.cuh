// All between a layer's two products for one token of each segment, as the code of one CUDA thread:
// the Cottention feature map in the registers of the step that takes it, and beside it the gelu.
//
// With delayed updates the state in the registers is that after all of them, as if each step had
// written it, and has the same bits; only what is written differs.
//
// A lane's quads of q and k hold whole rotary pairs. Their sums of squares run over the elements of
// a lane first and then over the lanes, as those of the step.
#pragma once

#include "features_gelu.cuh"
#include "recurrent.cuh"

namespace cottention::cuda {

// A thread of the step that maps its inputs; T is the type of q, k, v and the outputs.
template <class T, class TileShape>
struct MappingThread : Thread<T, T, TileShape> {
  using Base = Thread<T, T, TileShape>;
  using Base::Base;

  float squares[2];  // sums of squares of q and of k

  COTTENTION_HD static float squared(const Quad& x, float total) { return dot(x, x, total); }

  COTTENTION_HD static Quad rotated(const FeaturesGeluParams& m, const Quad& x, int64_t token,
                                    int column) {
    Quad out = x;
    COTTENTION_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int pair = column / 2 + i;
      if (pair >= m.pairs) break;
      const float cos = m.cos[token * m.pairs + pair], sin = m.sin[token * m.pairs + pair];
      out.x[2 * i] = x.x[2 * i] * cos - x.x[2 * i + 1] * sin;
      out.x[2 * i + 1] = x.x[2 * i + 1] * cos + x.x[2 * i] * sin;
    }
    return out;
  }

  // Reads the task's token, rotates q and k; `squares` get this lane's part of both sums.
  COTTENTION_HD void read_inputs(const FeaturesGeluParams& m, const BlockTask& task) {
    const int64_t token = task.first;
    const T* v = Base::input(m.v, task, token) + this->row;
    COTTENTION_UNROLL
    for (int r = 0; r < TileShape::kRows; ++r)
      this->now.value[r] = this->has_row(r) ? float(v[r * TileShape::kGroups]) : 0.0f;
    squares[0] = squares[1] = 0.0f;
    COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i) {
      const int column = this->column(i);
      if (column >= m.width) break;
      const T *q = Base::input(m.q, task, token), *k = Base::input(m.k, task, token);
      this->now.query[i] =
          rotated(m, load_input(q + column, m.is_inputs_aligned), token, column);
      this->now.key[i] = rotated(m, load_input(k + column, m.is_inputs_aligned), token, column);
      squares[0] = squared(this->now.query[i], squares[0]);
      squares[1] = squared(this->now.key[i], squares[1]);
    }
  }

  COTTENTION_HD static void divide(Quad& x, float by) {
    COTTENTION_UNROLL
    for (int i = 0; i < 4; ++i) x.x[i] /= by;
  }

  // Normalises q and k and scales v; the squares must be reduced over the lanes.
  COTTENTION_HD void map(const FeaturesGeluParams& m, const BlockTask& task) {
    const float q_norm = norm(squares[0]), k_norm = norm(squares[1]);
    const float below = position_power(m, task.first, task.head);
    COTTENTION_UNROLL
    for (int i = 0; i < TileShape::kPieces; ++i) {
      if (this->column(i) >= m.width) break;
      divide(this->now.query[i], q_norm);
      divide(this->now.key[i], k_norm);
    }
    COTTENTION_UNROLL
    for (int r = 0; r < TileShape::kRows; ++r) this->now.value[r] /= below;
  }
};

// The work of a block of the step, which has one token.
template <class TileShape, bool kIsDelayed, class Team>
COTTENTION_HD void run_attention_block(const StepParams& p, const FeaturesGeluParams& m,
                                       uint32_t block, Team& team) {
  const BlockTask task = block_task<TileShape, Form::kDecode>(p, block);
  if (!task.is_active) {
    team.await_inputs();
    return team.clear(p, task);
  }
  team.template load<Form::kDecode>(p, task, task.tile);
  if (kIsDelayed) team.add_delayed(p, task);
  team.await_inputs();
  team.read_inputs(m, task);
  team.reduce_squares();
  team.map(m, task);
  team.advance(p);
  team.reduce();
  team.write(p, task, task.first);
  if (kIsDelayed && num_delayed(p, task.slot) + 1 < p.delayed.capacity)
    team.append(p, task);
  else
    team.store(p);
}

// Calls visit(TileShape<…>{}) for heads of 8 to 256 channels.
template <class Visit>
void with_head_shape(int width, const Visit& visit) {
  const int quads = width / 4;
  if (quads <= 8) return visit(TileShape<8, 1>{});
  if (quads <= 16) return visit(TileShape<16, 1>{});
  if (quads <= 32) return visit(TileShape<32, 1>{});
  return visit(TileShape<32, 2>{});
}

}  // namespace cottention::cuda
