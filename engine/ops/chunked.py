"""The parallel form from an initial state: matrix products per chunk, one state per chunk border.

Owns the form that training differentiates through and that prefill on CUDA is made of. Agrees with
`reference.recurrent_step` to rounding; it sums in another order, so never to the bit.
"""

import torch
from cottention.engine.ops.reference import DENOMINATOR_FLOOR
from torch import Tensor


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
    z_borders = None
    if z is not None:
        z_borders, z = _running(ks.sum(-2), z)
    out = read_chunks(qs, ks, vs, borders, z_borders)
    return out.flatten(2, 3)[:, :, :length], state, z


def read_chunks(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, z_borders: Tensor | None
) -> Tensor:
    """Outputs [..., T, V] of chunks, each from the state that stood before it.

    q, k [..., T, K]; v [..., T, V]; borders [..., V, K]; z_borders [..., K] or None.
    """
    scores = (q @ k.transpose(-1, -2)).tril()
    out = scores @ v + q @ borders.to(q.dtype).transpose(-1, -2)
    if z_borders is None:
        return out
    total = scores.sum(-1, keepdim=True) + q @ z_borders.to(q.dtype).unsqueeze(-1)
    return out / total.clamp_min(DENOMINATOR_FLOOR)


def _split(x: Tensor, chunk_size: int) -> Tensor:
    """[B, H, T, D] → [B, H, chunks, chunk_size, D], zeros behind the end: they add nothing."""
    padding = -x.shape[-2] % chunk_size
    x = torch.nn.functional.pad(x, (0, 0, 0, padding))
    split: Tensor = x.unflatten(-2, (-1, chunk_size))
    return split


def _running(updates: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """Updates [B, H, chunks, …] → what stood before each chunk, and what stands after the last."""
    steps = torch.cat([initial.unsqueeze(2), updates.to(initial.dtype)], dim=2).cumsum(dim=2)
    return steps[:, :, :-1], steps[:, :, -1]
