"""From trained float32 weights to the half-width ones that are shipped.

Owns the choice between float16 and bfloat16: the one that scores better on the held-out files, as
rounded and then computed in float32.
"""

from typing import NamedTuple

import torch
from cottention.engine.model import CottentionForCausalLM
from cottention.engine.model_config import ModelConfig
from cottention.engine.training.score import HeldOut, Score, score
from torch import Tensor

HALF_WIDTHS = {"float16": torch.float16, "bfloat16": torch.bfloat16}

Weights = dict[str, Tensor]


class Rounded(NamedTuple):
    """Weights in `dtype`, the model that they make in float32, and its score."""

    dtype: str
    weights: Weights
    model: CottentionForCausalLM
    score: Score


def round_best(weights: Weights, config: ModelConfig, held_out: HeldOut) -> Rounded:
    """The half-width form of `weights` with fewer bits per byte."""
    both = [_rounded(weights, name, config, held_out) for name in HALF_WIDTHS]
    return min(both, key=lambda rounded: rounded.score.bits_per_byte)


def _rounded(weights: Weights, name: str, config: ModelConfig, held_out: HeldOut) -> Rounded:
    half = {key: weight.to(HALF_WIDTHS[name]).contiguous() for key, weight in weights.items()}
    model = CottentionForCausalLM(config).requires_grad_(False).eval()
    model.load_state_dict({key: weight.float() for key, weight in half.items()})
    return Rounded(name, half, model, score(model, held_out, dtype=torch.float32))
