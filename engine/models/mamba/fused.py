"""The blocks of a served Mamba-2 as one call of a compiled op, with the bits of `blocks.py`."""

from collections.abc import Iterable, Sequence
from typing import Self

import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.models.mamba.blocks import Mamba2Mixer
from cottention.engine.models.mamba.config import Mamba2Config
from cottention.engine.models.recurrence import Recurrence
from cottention.engine.models.recurrent_model import RMSNorm


class FusedBlocks:
    """`ops.mamba2_layers` on the weights of a model's blocks."""

    def __init__(self, config: Mamba2Config, weights: Sequence[Tensor]) -> None:
        self._config = config
        self._weights = weights

    @classmethod
    def of(cls, config: Mamba2Config, blocks: Iterable[tuple[RMSNorm, Mamba2Mixer]]) -> Self | None:
        """For norms and mixers that are served; None where the op does not take them."""
        if not ops.kernel_has_width(config.state_size, config.head_dim):
            return None
        weights = [weight for norm, mixer in blocks for weight in _weights_of(norm, mixer)]
        packed = [weight.detach() for weight in weights if weight is not None]
        return cls(config, packed) if len(packed) == len(weights) else None

    def __call__(self, x: Tensor, recurrence: Recurrence) -> Tensor:
        """x float32 [N, C] before the first block → after the last one, in place."""
        config, pool, rows = self._config, recurrence.tensors, recurrence.segments
        ops.mamba2_layers(
            x,
            self._weights,
            config.layer_norm_epsilon,
            config.n_groups,
            config.time_step_limit,
            pool["state"],
            pool["conv"],
            rows.state_indices,
            rows.cu_seqlens,
        )
        return x


def _weights_of(norm: RMSNorm, mixer: Mamba2Mixer) -> Iterable[Tensor | None]:
    """In the order of the op; None for a product whose weights are not packed."""
    first, last = mixer.project_in.packed, mixer.project_out.packed
    if first is None or last is None:
        yield None
        return
    convolution, bias = mixer.convolve.arranged
    yield from (norm.weight, first.weight, _or_empty(first.bias))
    yield from (convolution, _or_empty(bias), mixer.dt_bias, -torch.exp(mixer.A_log), mixer.D)
    yield from (mixer.norm.weight, last.weight, _or_empty(last.bias))


def _or_empty(bias: Tensor | None) -> Tensor:
    return torch.empty(0) if bias is None else bias
