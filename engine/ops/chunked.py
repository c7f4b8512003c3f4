"""The parallel form from an initial state: matrix products per chunk, one state per chunk border.

Owns the form that training differentiates through (and that CUDA prefill will use). Agrees with
`reference.recurrent_step` to rounding; it sums in another order, so never to the bit.
"""

import torch
from torch import Tensor

from engine.ops.reference import DENOMINATOR_FLOOR


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    z: Tensor | None = None,
    *,
    chunk_size: int = 128,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run T tokens of B sequences from `state`, `chunk_size` tokens at a time.

    q, k [B, H, T, K]; v [B, H, T, V]; state [B, H, V, K]; z [B, H, K] or None. Returns the outputs
    [B, H, T, V], the state and the denominator after the last token. Nothing is changed in place.
    """
    length = q.shape[-2]
    qs, ks, vs = (_split(x, chunk_size) for x in (q, k, v))
    borders, state = _running(vs.transpose(-1, -2) @ ks, state)
    scores = (qs @ ks.transpose(-1, -2)).tril()
    out = scores @ vs + qs @ borders.to(qs.dtype).transpose(-1, -2)
    if z is not None:
        z_borders, z = _running(ks.sum(-2), z)
        total = scores.sum(-1, keepdim=True) + qs @ z_borders.to(qs.dtype).unsqueeze(-1)
        out = out / total.clamp_min(DENOMINATOR_FLOOR)
    return out.flatten(2, 3)[:, :, :length], state, z


def _split(x: Tensor, chunk_size: int) -> Tensor:
    """[B, H, T, D] → [B, H, chunks, chunk_size, D], zeros behind the last token: they add nothing."""
    padding = -x.shape[-2] % chunk_size
    x = torch.nn.functional.pad(x, (0, 0, 0, padding))
    return x.unflatten(-2, (-1, chunk_size))


def _running(updates: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """Updates [B, H, chunks, …] → what stood before each chunk, and what stands after the last."""
    steps = torch.cat([initial.unsqueeze(2), updates.to(initial.dtype)], dim=2).cumsum(dim=2)
    return steps[:, :, :-1], steps[:, :, -1]
