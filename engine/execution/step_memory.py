"""The memory that steps take beside weights and states, known before the pool is allocated.

What the model's layers take is measured on a GPU, by the longest batches; what logits and sampling
take is computed from rows and vocabulary, for the graphs and for steps outside them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from cottention.engine.execution.cuda_graphs import MAX_ROWS
from cottention.engine.execution.model_runner import ModelRunner
from cottention.engine.sampling.topk_topp import sampling_bytes
from cottention.engine.state.pool import StatePool
from cottention.engine.state.spec import StateSpec

_NUM_SLOTS = 8
"""Of the pool on which the longest batches are measured: enough for prompts of mixed lengths."""

_LIBRARIES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""For what is not counted: workspaces of libraries, graphs' own nodes, fragments."""


class StepMemory(NamedTuple):
    """Bytes that must stay free beside the pool, by what takes them."""

    layers: int
    logits: int
    libraries: int

    @property
    def nbytes(self) -> int:
        """All of them."""
        return sum(self)

    def __str__(self) -> str:
        return (
            f"{self.nbytes:,} bytes for steps: {self.layers:,} for the layers of the longest batch,"
            f" {self.logits:,} for logits and sampling, {self.libraries:,} for libraries"
        )


def step_memory(device: str, num_rows: int, vocab_size: int, layers: int = 0) -> StepMemory:
    """That of steps of up to `num_rows` rows; layers: bytes, as `longest_batch_bytes` has them.

    On a GPU logits are kept by the graphs, in one tensor for all, and computed once more by steps
    outside them. On the CPU they are copied where a row needs them unchanged.
    """
    kind = torch.device(device).type
    num_outside = num_rows * vocab_size
    logits = 2 * num_outside * 4
    if kind == "cuda":
        num_captured = min(num_rows, MAX_ROWS) * vocab_size
        logits += sampling_bytes(num_outside) + 2 * num_captured * 4 + sampling_bytes(num_captured)
    return StepMemory(layers, logits, _LIBRARIES[kind])


def longest_batch_bytes(
    new_runner: Callable[[StatePool], ModelRunner],
    spec: StateSpec,
    device: str,
    max_tokens: int,
    max_length: int,
) -> int:
    """What the longest batches take on a GPU, on a pool of few slots; 0 on the CPU.

    max_tokens, max_length: as in `longest_batches`.
    """
    if not device.startswith("cuda"):
        return 0
    runner = new_runner(StatePool(spec, _NUM_SLOTS, device))
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    runner.run_longest_batches(max_tokens, max_length)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
