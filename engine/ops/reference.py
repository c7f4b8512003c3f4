"""Plain torch implementations of the ops: the definition of correct results.

They run on any device and in any floating-point type (float64 in the tests).

Letters: B segments, N tokens of all segments, T tokens of one sequence, H heads, K key width,
V value width, S slots.
"""

from itertools import pairwise

import torch
from torch import Tensor

DENOMINATOR_FLOOR = 1e-6
NORM_FLOOR = 1e-12
PADDING_SLOT = -1
NO_INDEX = -1


def parallel(q: Tensor, k: Tensor, v: Tensor, *, denominator: bool = False) -> Tensor:
    """Causal attention without softmax over whole sequences: o_t = Σ_{j≤t} (q_t·k_j) v_j.

    q, k [..., T, K] and v [..., T, V] give [..., T, V]. With `denominator`, each o_t is divided by
    max(Σ_{j≤t} q_t·k_j, 1e-6). Quadratic in T.
    """
    scores = (q @ k.transpose(-1, -2)).tril()
    out = scores @ v
    if not denominator:
        return out
    return out / scores.sum(-1, keepdim=True).clamp_min(DENOMINATOR_FLOOR)


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
) -> Tensor:
    """S ← S + v kᵀ, out = S q for each token, in token order; rows of the pool change in place.

    q, k [N, H, K]; v [N, H, V]; state [S, H, V, K] and z [S, H, K] or None; state_indices int32
    [B], each slot at most once; cu_seqlens int32 [B + 1]: segment i has the tokens
    cu_seqlens[i]:cu_seqlens[i + 1] (None: one token per segment). With z: z ← z + k, and out is
    divided by max(z·q, 1e-6). Computed in the type of the state. A state index of −1 is padding: no
    row changes and its outputs are zero. Returns [N, H, V] in the type of v.
    """
    out = torch.zeros_like(v)
    q, k, v = (x.to(state.dtype) for x in (q, k, v))
    bounds = range(len(state_indices) + 1) if cu_seqlens is None else cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    slots = state_indices.tolist()
    for step in range(max(lengths, default=0)):
        active = [i for i, n in enumerate(lengths) if step < n and slots[i] != PADDING_SLOT]
        if active:
            tokens = torch.tensor([bounds[i] + step for i in active], device=q.device)
            rows = state_indices[torch.tensor(active, device=state_indices.device)].long()
            outputs = _one_token(q[tokens], k[tokens], v[tokens], state, z, rows)
            out[tokens] = outputs.to(out.dtype)
    return out


def _one_token(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, z: Tensor | None, rows: Tensor
) -> Tensor:
    """One token for each of `rows` (int64 [B]); q, k [B, H, K], v [B, H, V] → [B, H, V]."""
    updated = state[rows] + v.unsqueeze(-1) * k.unsqueeze(-2)
    state[rows] = updated
    out = (updated * q.unsqueeze(-2)).sum(-1)
    if z is None:
        return out
    total = z[rows] + k
    z[rows] = total
    return out / (total * q).sum(-1, keepdim=True).clamp_min(DENOMINATOR_FLOOR)


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


def gelu_new(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def gelu_erf(x: Tensor) -> Tensor:
    """x Φ(x), Φ the normal distribution function."""
    return torch.nn.functional.gelu(x)


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1: x + 1 for x ≥ 0, exp(x) below."""
    return torch.where(x < 0, x.clamp_max(0).exp(), x + 1)
