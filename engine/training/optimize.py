"""How weights move: Muon for the blocks' matrices, AdamW for the rest, and the rate over time.

Owns optimizers and schedule. Knows nothing of data or of the clock.
"""

from collections.abc import Iterator
from typing import Any

import torch
from cottention.engine.model import CottentionForCausalLM
from torch import nn

WARMUP_STEPS = 100
STABLE_UNTIL = 0.3
GRADIENT_NORM_LIMIT = 1.0


class Optimizers:
    """Two optimizers that step, and are saved, as one."""

    def __init__(
        self, model: CottentionForCausalLM, learning_rate: float, weight_decay: float
    ) -> None:
        matrices: list[nn.Parameter] = []
        tables: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, weight in model.named_parameters():
            in_block = name.startswith("transformer.h.")
            kind = others if weight.ndim != 2 else matrices if in_block else tables
            kind.append(weight)
        self._learning_rate = learning_rate
        self._muon = torch.optim.Muon(
            matrices,
            lr=learning_rate,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adam = torch.optim.AdamW(
            [
                {"params": tables, "weight_decay": weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=learning_rate,
            betas=(0.9, 0.95),
            eps=1e-10,
        )
        self._weights = [*matrices, *tables, *others]

    def step(self, factor: float) -> None:
        """Apply the gradients at `factor` of the learning rate, then drop them."""
        torch.nn.utils.clip_grad_norm_(self._weights, GRADIENT_NORM_LIMIT)
        for optimizer in self._each():
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """Both optimizers' states."""
        return [optimizer.state_dict() for optimizer in self._each()]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Take back what `state_dict` gave."""
        for optimizer, state in zip(self._each(), states, strict=True):
            optimizer.load_state_dict(state)

    def _each(self) -> Iterator[torch.optim.Optimizer]:
        yield self._muon
        yield self._adam


def rate_factor(step: int, done: float) -> float:
    """Share of the learning rate at `step`, `done` of the way: warm-up, level, linear to zero."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * min(1.0, max(0.0, (1 - done) / (1 - STABLE_UNTIL)))
