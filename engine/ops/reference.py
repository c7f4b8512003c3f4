"""Plain torch implementations of the ops: the definition of correct results.

They run on any device and in any floating-point type (float64 in the tests).

Letters: B segments, N tokens of all segments, T tokens of one sequence, H heads, K key width,
V value width, S slots.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

DENOMINATOR_FLOOR = 1e-6
NORM_FLOOR = 1e-12
PADDING_SLOT = -1
NO_INDEX = -1
GROUP = 64
"""Channels that share a scale where weights have eight bits."""

_LARGEST = 127
_LEAST = 1e-30


def parallel(
    q: Tensor, k: Tensor, v: Tensor, *, w: Tensor | None = None, denominator: bool = False
) -> Tensor:
    """Causal attention without softmax over whole sequences: o_t = Σ_{j≤t} (q_t·k_j) v_j.

    q, k [..., T, K] and v [..., T, V] give [..., T, V]. With decays w [..., T] the score of j at t
    is multiplied by w_{j+1} ⋯ w_t. With `denominator`, each o_t is divided by the sum of its
    scores, at least 1e-6. Quadratic in T.
    """
    scores = (q @ k.transpose(-1, -2)).tril()
    if w is not None:
        scores = scores * decays_between(log_decay(w))
    out = scores @ v
    if not denominator:
        return out
    return out / scores.sum(-1, keepdim=True).clamp_min(DENOMINATOR_FLOOR)


def log_decay(w: Tensor) -> Tensor:
    """Σ_{j≤t} ln w_j of decays [..., T] in [0, 1]; 0 counts as the least normal number."""
    return w.clamp_min(torch.finfo(w.dtype).tiny).log().cumsum(-1)


def decays_between(sums: Tensor) -> Tensor:
    """w_{j+1} ⋯ w_t [..., T, T] for j < t, else 1, from the sums of `log_decay` [..., T]."""
    return (sums.unsqueeze(-1) - sums.unsqueeze(-2)).tril().exp()


def bidirectional(q: Tensor, k: Tensor, v: Tensor, *, denominator: bool = False) -> Tensor:
    """Attention without softmax or mask: o_t = Σ_j (q_t·k_j) v_j.

    q, k [..., T, K] and v [..., T, V] give [..., T, V]. With `denominator`, each o_t is divided by
    max(Σ_j q_t·k_j, 1e-6). Two passes over one K × V matrix, linear in T.
    """
    out = q @ (k.transpose(-1, -2) @ v)
    if not denominator:
        return out
    total = q @ k.sum(-2).unsqueeze(-1)
    return out / total.clamp_min(DENOMINATOR_FLOOR)


def recurrent_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    z: Tensor | None,
    state_indices: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    w: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """S ← S diag(w) + (S a) bᵀ + v kᵀ, out = S q for each token, in token order, in place.

    q, k [N, H, K]; v [N, H, V]; state [S, H, V, K] and z [S, H, K] or None; state_indices int32
    [B], each slot at most once; cu_seqlens int32 [B + 1]: segment i has the tokens
    cu_seqlens[i]:cu_seqlens[i + 1] (None: one token per segment). w [N, H] or [N, H, K], None for
    1; a, b [N, H, K], both or neither: S a is taken of the state before the decay. With z: z ← w∘z
    + k, and out is divided by max(z·q, 1e-6). Computed in the type of the state. A state index of
    −1 is padding: no row changes and its outputs are zero. Returns [N, H, V] in the type of v.
    """
    if not len(state_indices):
        return torch.zeros_like(v)
    dtype = v.dtype
    q, k, v = (x.to(state.dtype) for x in (q, k, v))
    terms = [None if x is None else x.to(state.dtype) for x in (w, a, b)]
    if cu_seqlens is None:  # nothing waits for a device
        rows = real_rows(state_indices)
        at = rows.source
        now = [None if x is None else x[at] for x in terms]
        out = _one_token(state, z, rows.slots, rows.is_any, q[at], k[at], v[at], *now)
        return out.masked_fill(rows.is_padding[:, None, None], 0).to(dtype)
    out = torch.zeros_like(v, dtype=dtype)
    always = torch.ones((), dtype=torch.bool, device=v.device)
    for at, slots in token_steps(state_indices, cu_seqlens):
        now = [None if x is None else x[at] for x in terms]
        out[at] = _one_token(state, z, slots, always, q[at], k[at], v[at], *now).to(dtype)
    return out


def _one_token(
    state: Tensor,
    z: Tensor | None,
    slots: Tensor,
    is_any: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
) -> Tensor:
    """One token for each of `slots` (int64 [B]); q, k, a, b [B, H, K], v [B, H, V] → [B, H, V].

    Nothing changes where is_any is false.
    """
    before = state[slots]
    updated = before if w is None else before * w.view(*w.shape[:2], 1, -1)
    if a is not None and b is not None:
        updated = updated + (before * a.unsqueeze(-2)).sum(-1, keepdim=True) * b.unsqueeze(-2)
    updated = updated + v.unsqueeze(-1) * k.unsqueeze(-2)
    state[slots] = torch.where(is_any, updated, before)
    out = (updated * q.unsqueeze(-2)).sum(-1)
    if z is None:
        return out
    decay = 1 if w is None else w.view(*w.shape[:2], -1)
    total = decay * z[slots] + k
    z[slots] = torch.where(is_any, total, z[slots])
    return out / (total * q).sum(-1, keepdim=True).clamp_min(DENOMINATOR_FLOOR)


def delayed_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    state_indices: Tensor,
) -> Tensor:
    """`recurrent_step` of one token for each slot, with updates that are delayed: out [N, H, V].

    The state of slot s is S + Σ_{i<n} v_i k_iᵀ with n = counts[s], keys [S, C, H, K] and values [S,
    C, H, V]. The token's update is appended; where it is the C-th, all are added to S, in place.
    counts int32 [S or more] stay as they are: the caller counts n ← (n + 1) mod C.
    """
    out = torch.zeros_like(v)
    for token, slot in enumerate(state_indices.tolist()):
        if slot < 0:
            continue
        count = int(counts[slot])
        keys[slot, count], values[slot, count] = k[token], v[token]
        now = state[slot] + _updates(keys[slot, : count + 1], values[slot, : count + 1])
        out[token] = (now @ q[token].unsqueeze(-1)).squeeze(-1)
        if count + 1 == keys.shape[1]:
            state[slot] = now
    return out


def fold_updates(state: Tensor, keys: Tensor, values: Tensor, counts: Tensor, rows: Tensor) -> None:
    """S ← S + Σ_{i<n} v_i k_iᵀ, n = counts[row], of each of `rows` that is in the pool, in place.

    state [S, H, V, K]; keys [S, C, H, K] and values [S, C, H, V].
    """
    for row in rows.tolist():
        if 0 <= row < len(state):
            count = int(counts[row])
            state[row] += _updates(keys[row, :count], values[row, :count])


def _updates(keys: Tensor, values: Tensor) -> Tensor:
    """Σ_i v_i k_iᵀ of keys [n, H, K] and values [n, H, V]: [H, V, K]."""
    return torch.einsum("nhv,nhk->hvk", values, keys)


def rotary_table(positions: Tensor, rotary_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of positions · base^(−2i / rotary_dim), for i below rotary_dim / 2.

    positions int64 [N], counted from 0. Angles are computed in float64, exact to 2⁻¹² up to
    position 2⁴⁰ (in float32 the error is 0.02 at 10⁶). Returns two float64 tensors [N, rotary_dim /
    2].
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions.double().unsqueeze(-1) * base ** (-exponents / rotary_dim)
    return angles.cos(), angles.sin()


def cottention_features(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, sigma: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary embedding, then q and k divided by their norm and v by (position + 1)^sigma.

    q, k, v [..., N, H, D]; positions int64 [N], counted from 0; sigma float64 [H]; cos, sin [N, R /
    2] rotate the first R of the D channels. The power is computed in float64.
    """
    scale = torch.exp(-sigma * torch.log(positions.double() + 1).unsqueeze(-1)).to(v.dtype)
    q, k = (_normalise(rotate(x, cos, sin)) for x in (q, k))
    return q, k, v * scale.unsqueeze(-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs (2i, 2i + 1), i < R / 2, of x [..., N, H, D]; angles [N, R / 2]."""
    rotary_dim = 2 * cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    even, odd = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([rotated, x[..., rotary_dim:]], dim=-1)


def _normalise(x: Tensor) -> Tensor:
    """N(x) = x / max(‖x‖₂, 1e-12) along the last dimension."""
    return torch.nn.functional.normalize(x, dim=-1, eps=NORM_FLOOR)


def argmax(logits: Tensor) -> Tensor:
    """First index of the largest logit of each row of [R, N], −1 if it is not finite: int64 [R]."""
    largest, indices = logits.max(dim=-1)
    return indices.masked_fill(~largest.isfinite(), NO_INDEX)


def apply_token_bitmask(
    logits: Tensor, rows: Sequence[int], bitmask: Tensor, places: Sequence[int]
) -> None:
    """Set logits [R, N] of row rows[i] to −∞ where bitmask[places[i]], int32 [W], has no bit."""
    is_allowed = unpack_bitmask(bitmask[list(places)].to(logits.device))[:, : logits.shape[-1]]
    chosen = torch.tensor(rows, device=logits.device)
    columns = is_allowed.shape[-1]
    kept = logits[chosen, :columns].masked_fill(~is_allowed, -torch.inf)
    logits[chosen, :columns] = kept


def unpack_bitmask(bitmask: Tensor) -> Tensor:
    """The bits of packed masks int32 [M, W], the lowest first: bool [M, 32·W]."""
    bits = bitmask.unsqueeze(-1) >> torch.arange(32, device=bitmask.device)
    return (bits & 1).bool().flatten(1)


def gelu_new(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def gelu_erf(x: Tensor) -> Tensor:
    """x Φ(x), Φ the normal distribution function."""
    return torch.nn.functional.gelu(x)


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1: x + 1 for x ≥ 0, exp(x) below."""
    return torch.where(x < 0, x.clamp_max(0).exp(), x + 1)


def silu(x: Tensor) -> Tensor:
    """x σ(x)."""
    return torch.nn.functional.silu(x)


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ)."""
    return torch.nn.functional.softplus(x)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, groups: int = 1) -> Tensor:
    """weight · x / √(mean(x²) + ε), the mean over each of `groups` equal parts of a row.

    x [..., C], weight [C] → [..., C].
    """
    parts: Tensor = x.unflatten(-1, (groups, -1))
    scale = (parts.square().mean(-1, keepdim=True) + epsilon).sqrt()
    out: Tensor = (parts / scale).flatten(-2) * weight
    return out


def token_steps(
    state_indices: Tensor, cu_seqlens: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The first token of every segment, then the second, and so on: (tokens, rows), int64 [n].

    Padding is left out, and segments that have ended.
    """
    bounds = range(len(state_indices) + 1) if cu_seqlens is None else cu_seqlens.tolist()
    slots = state_indices.tolist()
    spans = [(slots[i], span) for i, span in enumerate(pairwise(bounds)) if slots[i] >= 0]
    for step in range(max((stop - start for _, (start, stop) in spans), default=0)):
        now = [(start + step, slot) for slot, (start, stop) in spans if start + step < stop]
        tokens, rows = torch.tensor(now, device=state_indices.device).unbind(1)
        yield tokens, rows


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tails: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """y_t = Σ_j weight_j ∘ x_{t−W+1+j} + bias, causal and depthwise; rows of tails are updated.

    x [N, C]; weight [W, C], the last row is the current token's; bias [C] or None; tails
    [S, W − 1, C]: the inputs of the tokens before, the oldest first; state_indices and cu_seqlens
    as in `recurrent_step`. The sum begins with the bias and goes from the oldest input to the
    current one. Outputs of padding are zero. Returns [N, C].
    """
    if len(x) == 0:
        return torch.zeros_like(x)
    rows = real_rows(state_indices)
    starts, lengths = _bounds(state_indices, cu_seqlens)
    kept = len(weight) - 1
    segment = torch.arange(len(starts), device=x.device)
    segment = segment.repeat_interleave(lengths, output_size=len(x))
    token = torch.arange(len(x), device=x.device)
    offset = token - starts[segment]

    def before(segment: Tensor, offset: Tensor) -> Tensor:
        """Inputs at these offsets from their segments' first tokens; negative ones are tails."""
        own = x[(starts[segment] + offset).clamp(0, len(x) - 1)]
        earlier = tails[rows.slots[segment], (offset + kept).clamp(0, max(kept - 1, 0))]
        return torch.where((offset < 0).unsqueeze(-1), earlier, own)

    total = torch.zeros_like(x) if bias is None else bias.expand_as(x)
    for j, row in enumerate(weight):
        at = offset - kept + j
        inputs = before(segment, at) if j < kept else x
        total = total + row * inputs
    if kept:
        last = lengths[rows.source]
        now = [before(rows.source, last - kept + j) for j in range(kept)]
        tails[rows.slots] = torch.where(rows.is_any, torch.stack(now, dim=1), tails[rows.slots])
    return total.masked_fill(rows.is_padding[segment].unsqueeze(-1), 0)


class RealRows(NamedTuple):
    """Rows of a batch with padding, so that it can be written without waiting for a device.

    Padding stands for the first segment that is none: it is given the same row, and writes the same
    value. slots: int64 [B]. source: int64 [B], the segment that each stands for. is_padding: bool
    [B]. is_any: bool [], false where all are padding and nothing may change.
    """

    slots: Tensor
    source: Tensor
    is_padding: Tensor
    is_any: Tensor


def real_rows(state_indices: Tensor) -> RealRows:
    """Of state_indices int32 [B]; −1 is padding."""
    is_padding = state_indices < 0
    own = torch.arange(len(state_indices), device=state_indices.device)
    first = (~is_padding).int().argmax()
    source = torch.where(is_padding, first, own)
    slots = state_indices[source].long().clamp_min(0)
    return RealRows(slots, source, is_padding, ~is_padding.all())


def _bounds(state_indices: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """First token and number of tokens of each segment: int64 [B]."""
    if cu_seqlens is None:
        starts = torch.arange(len(state_indices), device=state_indices.device)
        return starts, torch.ones_like(starts)
    bounds = cu_seqlens.long()
    return bounds[:-1], bounds.diff()


def selective_scan(
    u: Tensor,
    delta: Tensor,
    log_decay: Tensor,
    k: Tensor,
    q: Tensor,
    state: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """S_cn ← exp(Δ_c A_cn) S_cn + Δ_c u_c k_n, out_c = Σ_n S_cn q_n (alg. 2, arXiv 2312.00752).

    u, delta [N, C]; log_decay, A [C, K], negative; k, q [N, K], the paper's B and C; state
    [S, C, K], whose rows are updated; state_indices and cu_seqlens as in `recurrent_step`. Outputs
    of padding are zero. Returns [N, C].
    """
    if cu_seqlens is None:
        rows = real_rows(state_indices)
        taken = [x[rows.source] for x in (u, delta, k, q)]
        updated, out = _scan_one(state[rows.slots], log_decay, *taken)
        state[rows.slots] = torch.where(rows.is_any, updated, state[rows.slots])
        return out.masked_fill(rows.is_padding.unsqueeze(-1), 0)
    out = torch.zeros_like(u)
    for tokens, slots in token_steps(state_indices, cu_seqlens):
        taken = [x[tokens] for x in (u, delta, k, q)]
        state[slots], out[tokens] = _scan_one(state[slots], log_decay, *taken)
    return out


def _scan_one(
    state: Tensor, log_decay: Tensor, u: Tensor, delta: Tensor, k: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of each of B rows: the states [B, C, K] after it, and the outputs [B, C]."""
    step = delta.unsqueeze(-1)
    state = torch.exp(step * log_decay) * state + step * u.unsqueeze(-1) * k.unsqueeze(-2)
    return state, (state * q.unsqueeze(-2)).sum(-1)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from −127 to 127, and what to multiply those of each group of 64 channels with.

    x [N, C] → int8 [N, G, 64], the last group filled with zeros, and scales [N, G] of x's type. A
    group's largest magnitude becomes 127, or all are 0 where it is below 1e-30. Ties go to even.
    """
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    is_zero = largest < _LEAST
    inverse = torch.where(is_zero, 0, torch.full_like(largest, _LARGEST) / largest)
    whole = (groups * inverse.unsqueeze(-1)).round().to(torch.int8)
    return whole, torch.where(is_zero, 0, largest / _LARGEST)


def quantized_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias with both quantized: x [N, C] float32 → [N, O].

    weight [O, G, 64] and scales [O, G]: as `quantize` returned them. The sum of a group is a whole
    number, exact in any order; groups are added one after the other. So the bits of a row do not
    depend on the other rows.
    """
    rows, row_scales = (part.transpose(0, 1) for part in quantize(x))  # [G, N, 64], [G, N]
    out = x.new_zeros(len(x), len(weight))
    for g, (row, row_scale) in enumerate(zip(rows, row_scales, strict=True)):
        sums = row.to(x.dtype) @ weight[:, g].to(x.dtype).T
        out = out + sums * (row_scale.unsqueeze(1) * scales[:, g])
    return out if bias is None else out + bias
