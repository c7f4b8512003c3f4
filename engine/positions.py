"""What a model makes of where its tokens stand: rotary angles, and cosFormer's half wave.

Owns the tables that all layers of a step share. Knows no tensors of tokens and no state.

Letters: N tokens, M cosFormer's fixed length.
"""

import functools
import math
from dataclasses import dataclass

import torch
from cottention.engine import ops
from cottention.engine.model_config import ModelConfig
from torch import Tensor

ROTARY_BASE = 10_000.0


@dataclass(frozen=True, slots=True)
class TokenPositions:
    """Where the N tokens of a batch stand, worked out once per step for all layers.

    index: int64 [N], counted from 0 from the start of each token's own sequence.
    cos, sin: [N, rotary_dim / 2], the rotary angles of those positions; no columns without rotary.
    wave: [N, 2], sine and cosine of π·t/2M with t counted from 1, where the attention has an M.
    """

    index: Tensor
    cos: Tensor
    sin: Tensor
    wave: Tensor | None = None


def token_positions(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> TokenPositions:
    """For int64 positions [N], counted from 0, in a model of `dtype`: tables float32 or wider.

    Raises IndexError on a CPU for a position that an attention with a fixed length does not have.
    """
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = ops.rotary_table(positions, config.rotary_dim, ROTARY_BASE, wide)
    if config.max_exact_length is None:
        return TokenPositions(positions, cos, sin)
    wave = half_wave(config.max_exact_length, wide, positions.device)
    return TokenPositions(positions, cos, sin, wave[positions])


@functools.cache
def half_wave(max_length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sine and cosine of π·t/2M for t from 1 to M: [M, 2].

    A table, taken in Python's float64 one by one: torch's own sines may differ in the last bit
    with the number of positions that they are asked for.
    """
    angles = [math.pi / 2 * t / max_length for t in range(1, max_length + 1)]
    pairs = [[math.sin(angle), math.cos(angle)] for angle in angles]
    with torch.inference_mode(False):  # it outlives the step that asks first, and may be trained on
        return torch.tensor(pairs, dtype=torch.float64).to(device, dtype)
