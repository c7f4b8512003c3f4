"""Compiled ops that do the work of several ops in one call. The reference has those alone.

Letters: R rows, N tokens, C channels, H heads, D head width, K key width, V value width, G groups,
W width of a convolution, L layers, S slots, B segments.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from cottention.engine.ops import loader, reference
from cottention.engine.ops.checks import fused_kernel_has_width
from cottention.engine.ops.loader import backend, cuda_takes

MapKind = Literal["linear", "cosformer", "performer", "fourier"]
MAP_KINDS: tuple[MapKind, ...] = get_args(MapKind)
"""In the order of `Map` in csrc/cuda/params.h."""


def cottention_attention_gelu(
    joined: Tensor,
    positions: Tensor,
    sigma: Tensor,
    cos: Tensor,
    sin: Tensor,
    state: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor | None,
    out: Tensor,
) -> None:
    """`cottention_features`, `recurrent_step` and `gelu_new` in one pass; equal bits on the CPU.

    joined [N, 3C + inner] has q, k, v and the MLP's input side by side; out [N, C + inner] receives
    the output of attention and the gelu; both float32 and contiguous. positions int64 [N], counted
    from 0; sigma float64 [H]; cos, sin float32 [N, rotary_dim / 2]; state [S, H, D, D] is updated
    in place, there is no denominator; state_indices and cu_seqlens as in `recurrent_step`. On CUDA
    joined and out may also be bfloat16 or float16, results equal the three ops to rounding, and
    cu_seqlens must be None (`cottention_pieces_gelu`). Raises RuntimeError for arguments that do
    not fit and for a D that is no multiple of 8 up to 256.
    """
    torch.ops.cottention.cottention_attention_gelu(
        joined, positions, sigma, cos, sin, state, state_indices, cu_seqlens, out
    )


def cottention_pieces_gelu(*inputs: Tensor, pieces: Tensor, num_cut: int, out: Tensor) -> None:
    """`cottention_attention_gelu` on CUDA for segments of any length.

    inputs: joined to state, as there. pieces int32 [P, 5] and num_cut are those of `Segments`.
    Raises RuntimeError.
    """
    torch.ops.cottention.cottention_pieces_gelu(*inputs, pieces, num_cut, out)


def cottention_delayed_gelu(
    *inputs: Tensor, updates: tuple[Tensor, Tensor, Tensor], state_indices: Tensor, out: Tensor
) -> None:
    """`cottention_attention_gelu` on CUDA with updates that are delayed, to the same bits.

    inputs: joined to state, as there. updates: keys [S, C, H, D] and values [S, C, H, D], float32,
    and counts int32 [S or more]: a state is that of its slot plus the first counts[slot] of its
    updates. The token's becomes the next one, or, where it is the C-th, the state is written with
    all of them. counts stay as they are: they are those of all layers. Raises RuntimeError.
    """
    torch.ops.cottention.cottention_delayed_gelu(*inputs, *updates, state_indices, out)


def map_gelu(
    kind: MapKind,
    joined: Tensor,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    heads: int,
    value_width: int,
    *,
    table: Tensor | None = None,
    projection: Tensor | None = None,
    gate: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """On CUDA, another map of q, k and v than Cottention's, and `gelu_new`, in one kernel.

    joined, cos, sin and out as in `cottention_attention_gelu`; of out the gelu's columns are
    written. table float32 [N, 2]: what cosFormer multiplies by. projection float32, contiguous:
    Performer's [M, D] or RFA's [H, F, D]. gate: float32 inputs [N, C], weight [H, C], bias [H].
    Returns q, k [N, H, K], v [N, H, V], which a one and zeros follow where V is more than the width
    of a head, and the decay w [N, H] or None, float32, as `FeatureMap.features` and `gate` of these
    maps define them. Raises RuntimeError.
    """
    width = (joined.shape[1] - out.shape[1]) // (2 * heads)
    features = 0 if projection is None else projection.shape[-2]
    key_width = {"linear": width, "cosformer": 2 * width, "performer": features}.get(
        kind, 2 * features
    )
    q, k, v = (
        joined.new_empty(len(joined), heads, n, dtype=torch.float32)
        for n in (key_width, key_width, value_width)
    )
    w = joined.new_empty(len(joined), heads, dtype=torch.float32) if gate else None
    gated: Sequence[Tensor | None] = gate or (None, None, None)
    given = MAP_KINDS.index(kind), cos, sin, table, projection, *gated
    torch.ops.cottention.map_gelu(joined, *given, q, k, v, w, out)
    return q, k, v, w


def divide_outputs(mixed: Tensor, floor: float, out: Tensor) -> None:
    """On CUDA, out ← mixed / ±max(|total|, floor) with the sign of the total, in one kernel.

    mixed float32 [N, H, D + 1 or more], the total behind the values of each head; out [N, H, D] of
    any type, a part of wider rows. Raises RuntimeError.
    """
    torch.ops.cottention.divide_outputs(mixed, floor, out)


def fold_updates(state: Tensor, keys: Tensor, values: Tensor, counts: Tensor, rows: Tensor) -> None:
    """S ← S + Σ v kᵀ over the first counts[row] updates of each of `rows` int32 [B], in place.

    state [S, H, V, K]; keys [S, C, H, K] and values [S, C, H, V], as in `cottention_delayed_gelu`.
    Rows out of range are skipped. Counts stay as they are.
    """
    if cuda_takes(state):
        torch.ops.cottention.fold_updates(state, keys, values, counts, rows)
    else:
        reference.fold_updates(state, keys, values, counts, rows)


def can_fuse_attention(device: str, width: int) -> bool:
    """Whether `cottention_attention_gelu` takes heads of this width on a device but the CPU."""
    return device != "cpu" and fused_kernel_has_width(width) and loader.is_cuda_ready()


def cottention_layers(
    x: Tensor,
    weights: Sequence[Tensor],
    epsilon: float,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    state: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor | None,
    normed: Tensor,
    joined: Tensor,
    attn_gelu: Tensor,
) -> None:
    """All blocks of a packed model, with the bits of the four ops of each; x [N, C] in place.

    x and all activations are float32. weights, for each block: weight and bias [C] of the norm;
    packed weight and bias [3C + inner] of the first product; sigma float64 [H]; packed weight and
    bias [C] of the second. state [S, L, H, D, D] is updated in place. normed [N, C], joined [N, 3C
    + inner] and attn_gelu [N, C + inner] are scratch buffers. The rest as in
    `cottention_attention_gelu`. Raises RuntimeError.
    """
    torch.ops.cottention.cottention_layers(
        x,
        weights,
        epsilon,
        positions,
        cos,
        sin,
        state,
        state_indices,
        cu_seqlens,
        normed,
        joined,
        attn_gelu,
    )


def mamba2_layers(
    x: Tensor,
    weights: Sequence[Tensor],
    epsilon: float,
    groups: int,
    step_limit: Sequence[float],
    state: Tensor,
    conv: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor | None,
) -> None:
    """All blocks of a packed Mamba-2, with the bits of the ops of each; x [N, C] in place.

    x is float32, and so is all that is computed. weights, for each block: weight [C] of the norm;
    packed input product and its bias; the convolution's [W, H V + 2 G K] and its bias; dt_bias,
    −exp(A_log) and D, [H]; weight [H V] of the gated norm; packed output product and its bias. A
    bias that is absent has no elements. epsilon: of both norms. groups: G. step_limit: the least
    and the greatest time step. state [S, L, H, V, K] and conv [S, L, W − 1, H V + 2 G K], float32,
    are updated in place. state_indices and cu_seqlens as in `recurrent_step`. Raises RuntimeError.
    """
    torch.ops.cottention.mamba2_layers(
        x, weights, epsilon, groups, step_limit, state, conv, state_indices, cu_seqlens
    )


def rwkv7_layers(
    x: Tensor,
    weights: Sequence[Tensor],
    epsilon: float,
    group_epsilon: float,
    ranks: Sequence[int],
    inner: int,
    state: Tensor,
    att_shift: Tensor,
    ffn_shift: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor | None,
) -> None:
    """All blocks of a packed RWKV-7, with the bits of the ops of each; x [N, C] in place.

    x is float32, and so is all that is computed. weights, for each block: weight and bias [C] of
    the norm; the shifts' mixes [6, C] of r, w, k, v, a and g; packed r, k, v and output; for w and
    a packed down and up and the bias [C]; for g packed down and up; for v packed down and up and
    the bias, which the first block does not use; k_k, k_a, r_k, and weight and bias of the norm of
    the heads, [H, K]; weight and bias of the second norm; its mix [1, C]; packed key and value.
    epsilon: of the norms; group_epsilon: of that of the heads. ranks: of w, a, g and v. inner:
    width of channel mixing. state [S, L, H, K, K], att_shift and ffn_shift [S, L, C], float32, are
    updated in place. state_indices and cu_seqlens as in `recurrent_step`. Raises RuntimeError.
    """
    torch.ops.cottention.rwkv7_layers(
        x,
        weights,
        epsilon,
        group_epsilon,
        ranks,
        inner,
        state,
        att_shift,
        ffn_shift,
        state_indices,
        cu_seqlens,
    )


def sample(logits: Tensor, argmax: Tensor, sampling_rows: Tensor) -> Tensor:
    """A random token id for each row, after temperature, min_p, top_k and top_p: int64 [R].

    logits float32 [R, N] on the CPU; argmax int64 [R], from the op `argmax`; sampling_rows
    float64 [R, 5]: a random number in [0, 1), temperature, min_p, top_k (0 or less: off) and top_p
    (1: off). A row gets its argmax where the temperature is 0 or the argmax is negative.
    """
    out: Tensor = torch.ops.cottention.sample(logits, argmax, sampling_rows)
    return out


def can_sample(logits: Tensor) -> bool:
    """Whether `sample` takes these logits: float32 on the CPU, with compiled ops."""
    is_single = logits.dtype == torch.float32 and logits.device.type == "cpu"
    return is_single and backend() == "compiled"
