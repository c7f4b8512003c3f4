"""What bidirectional attention does to queries, keys and values before the recurrence.

Cottention (arXiv 2409.18747): N(q), N(k) and v / s^σ(m), s the number of the text's tokens.
cosFormer (arXiv 2202.08791): ReLU(x) times sine and cosine of π·t/2M, t from 1, with denominator.

Letters: N tokens, H heads, D head width, K key width.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.models.bert.config import BertConfig
from cottention.engine.models.gptj.feature_maps.cosformer import half_wave


class FeatureMap(Protocol):
    """The map of one kind of attention.

    positions int64 [N], from 0; lengths int64 [N], tokens of each row's text; sigma float64 [H].
    """

    def queries(self, q: Tensor, positions: Tensor) -> Tensor:
        """q [..., N, H, D] → [..., N, H, K]."""
        ...

    def keys_values(
        self, k: Tensor, v: Tensor, positions: Tensor, lengths: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """k and v [..., N, H, D] → [..., N, H, K] and [..., N, H, D]."""
        ...


class Cottention:
    """N(x) = x / max(‖x‖₂, 1e-12), and values divided by s^σ(m)."""

    def __init__(self, config: BertConfig) -> None:
        self._heads = config.num_attention_heads

    def queries(self, q: Tensor, positions: Tensor) -> Tensor:
        no_sigma = torch.zeros(self._heads, dtype=torch.float64, device=q.device)
        return _cottention(q, q, q, positions, no_sigma)[0]

    def keys_values(
        self, k: Tensor, v: Tensor, positions: Tensor, lengths: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        del positions
        _, k, v = _cottention(k, k, v, lengths - 1, sigma)
        return k, v


def _cottention(
    q: Tensor, k: Tensor, v: Tensor, last: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The causal map without rotary embedding: values are divided by (last + 1)^σ."""
    no_angles = torch.empty(len(last), 0, dtype=torch.promote_types(q.dtype, torch.float32))
    no_angles = no_angles.to(q.device)
    return ops.cottention_features(q, k, v, last, sigma, no_angles, no_angles)


class CosFormer:
    """[ReLU(x) sin(πt/2M); ReLU(x) cos(πt/2M)], for queries and keys."""

    def __init__(self, config: BertConfig) -> None:
        self._max_length = config.half_wave_length

    def queries(self, q: Tensor, positions: Tensor) -> Tensor:
        wave = half_wave(self._max_length, q.dtype, q.device)[positions]
        sin, cos = wave.unsqueeze(-2).split(1, dim=-1)  # [N, 1, 1]
        q = torch.relu(q)
        return torch.cat([q * sin, q * cos], dim=-1)

    def keys_values(
        self, k: Tensor, v: Tensor, positions: Tensor, lengths: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        del lengths, sigma
        return self.queries(k, positions), v


FEATURE_MAPS: dict[str, Callable[[BertConfig], FeatureMap]] = {
    "cottention": Cottention,
    "cosformer": CosFormer,
}
"""By the `attention_type` of a config.json."""
