"""The recurrence and what surrounds it, written to be read: the definition of correct.

Owns plain torch forms of every operation that has a compiled one, in whatever float type they are
given (float64 in the tests), on any device. Knows no model, no batch policy and no session.

Letters: B segments, N tokens of all segments, T tokens of one sequence, H heads, K key width,
V value width, S slots.
"""

from itertools import pairwise

import torch
from torch import Tensor

DENOMINATOR_FLOOR = 1e-6
NORM_FLOOR = 1e-12
PADDING_SLOT = -1
NO_PLACE = -1


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
    """The same over all j: one K × V matrix is all that is remembered of a text of any length.

    q, k [..., T, K] and v [..., T, V] give [..., T, V]: two passes, linear in T.
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
    slots: Tensor,
    offsets: Tensor | None = None,
) -> Tensor:
    """Advance rows of the pool in place, token by token, and read each token's output.

    q, k [N, H, K]; v [N, H, V]; state [S, H, V, K] and z [S, H, K] are changed in place;
    slots int32 [B]; offsets int32 [B + 1] gives segment i the tokens offsets[i]:offsets[i + 1]
    (None: one token per slot). Per token: state += v ⊗ k, z += k, out = state q, divided by
    max(z·q, 1e-6) where z is given, all in the state's type. A slot of −1 is padding: nothing moves
    and its outputs are zeros. Returns [N, H, V] in the type of v. Each slot may be named once.
    """
    out = torch.zeros_like(v)
    q, k, v = (x.to(state.dtype) for x in (q, k, v))
    bounds = range(len(slots) + 1) if offsets is None else offsets.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    for step in range(max(lengths, default=0)):
        live = [i for i, n in enumerate(lengths) if step < n and int(slots[i]) != PADDING_SLOT]
        if live:
            tokens = torch.tensor([bounds[i] + step for i in live], device=q.device)
            rows = slots[torch.tensor(live, device=slots.device)].long()
            read = _one_token(q[tokens], k[tokens], v[tokens], state, z, rows)
            out[tokens] = read.to(out.dtype)
    return out


def _one_token(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, z: Tensor | None, rows: Tensor
) -> Tensor:
    """One token for each of `rows` (int64 [B]); q, k [B, H, K], v [B, H, V] → [B, H, V]."""
    moved = state[rows] + v.unsqueeze(-1) * k.unsqueeze(-2)
    state[rows] = moved
    out = (moved * q.unsqueeze(-2)).sum(-1)
    if z is None:
        return out
    total = z[rows] + k
    z[rows] = total
    return out / (total * q).sum(-1, keepdim=True).clamp_min(DENOMINATOR_FLOOR)


def rotary_table(positions: Tensor, rotary_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions · base^(−2i / rotary_dim), for i below rotary_dim / 2.

    positions int64 [N], counted from 0. The angles are computed in float64, right to 2⁻¹² up to
    position 2⁴⁰ (in float32 they are off by 0.02 at 10⁶). Returns two tensors float64
    [N, rotary_dim / 2].
    """
    steps = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions.double().unsqueeze(-1) * base ** (-steps / rotary_dim)
    return angles.cos(), angles.sin()


def cottention_features(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, sigma: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary, then q and k to unit length and v divided by (position + 1)^sigma.

    q, k, v [..., N, H, D]; positions int64 [N], counted from 0; sigma float64 [H];
    cos, sin [N, R / 2] turn the first R of each head's D. The power is taken in float64.
    """
    scale = torch.exp(-sigma * torch.log(positions.double() + 1).unsqueeze(-1)).to(v.dtype)
    q, k = (_unit(rotate(x, cos, sin)) for x in (q, k))
    return q, k, v * scale.unsqueeze(-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of the first R of x [..., N, H, D] by the angles [N, R / 2]."""
    rotary_dim = 2 * cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    even, odd = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., rotary_dim:]], dim=-1)


def _unit(x: Tensor) -> Tensor:
    """N(x) = x / max(‖x‖₂, 1e-12) along the last dimension."""
    return torch.nn.functional.normalize(x, dim=-1, eps=NORM_FLOOR)


def likeliest(logits: Tensor) -> Tensor:
    """argmax of each row of logits [R, N], −1 where the largest is not finite: int64 [R]."""
    best, places = logits.max(dim=-1)
    return places.masked_fill(~best.isfinite(), NO_PLACE)


def gelu_new(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1: x + 1 from 0 on, exp(x) below."""
    return torch.where(x < 0, x.clamp_max(0).exp(), x + 1)
