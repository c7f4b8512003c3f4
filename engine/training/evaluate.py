"""Evaluates a model: bits per byte on the held-out files, and greedy sample texts.

Bits per byte are the sum of −log₂ p over all tokens of the held-out files, each predicted once in
the windows of `data.held_out_windows`, divided by the bytes of the files.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from cottention.engine.models.gptj.model import CottentionForCausalLM
from cottention.engine.training.data import (
    IGNORE_INDEX,
    SourceFile,
    Windows,
    end_of_text_id,
    held_out_windows,
    padded_batches,
)
from cottention.engine.training.forward import logits_of, token_losses

FIRST_RANGE = 128


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out files as windows of tokens, their bytes in total, and the bytes of each token id."""

    windows: tuple[Windows, ...]
    num_bytes: int
    token_bytes: Tensor

    @classmethod
    def of(cls, tokenizer: Tokenizer, files: Sequence[SourceFile], context: int) -> "HeldOut":
        return cls(
            tuple(held_out_windows(tokenizer, files, context)),
            sum(file.num_bytes for file in files),
            token_lengths(tokenizer),
        )


@dataclass(frozen=True, slots=True)
class Score:
    """Bits per byte in total, and by the position of the token in its window."""

    bits_per_byte: float
    by_position: dict[str, float]


def token_lengths(tokenizer: Tokenizer) -> Tensor:
    """Number of bytes of each token id, int64: byte-level tokens have a character per byte."""
    pieces = tokenizer.get_vocab()
    lengths = torch.zeros(len(pieces), dtype=torch.int64)
    for piece, token in pieces.items():
        lengths[token] = len(piece)
    return lengths


@torch.no_grad()
def score(
    model: CottentionForCausalLM, held_out: HeldOut, *, dtype: torch.dtype, batch: int = 4
) -> Score:
    """Score the model in evaluation mode with products in `dtype`; then restore its mode."""
    was_training = model.training
    model.eval()
    device = model.lm_head.weight.device
    longest = max(window.inputs.shape[1] for window in held_out.windows)
    total_nats = torch.zeros(longest, dtype=torch.float64)
    total_bytes = torch.zeros(longest, dtype=torch.float64)
    for group in padded_batches(held_out.windows, batch):
        logits = logits_of(model, group.inputs.to(device), dtype=dtype)
        length = group.inputs.shape[1]
        total_nats[:length] += token_losses(logits, group.targets.to(device)).double().sum(0).cpu()
        total_bytes[:length] += _bytes_by_position(group.targets, held_out.token_bytes)
    model.train(was_training)
    return summarise(total_nats, total_bytes, held_out.num_bytes)


def summarise(total_nats: Tensor, total_bytes: Tensor, num_bytes: int) -> Score:
    """The score, from sums by position float64 [T]; `num_bytes` is the total of the files."""
    return Score(
        float(total_nats.sum()) / math.log(2) / num_bytes,
        {
            f"{start}-{stop}": float(total_nats[start:stop].sum() / total_bytes[start:stop].sum())
            / math.log(2)
            for start, stop in position_ranges(len(total_nats))
        },
    )


def position_ranges(length: int) -> list[tuple[int, int]]:
    """(0, 128), (128, 256), (256, 512) and so on, doubling until `length` is covered."""
    ranges = [(0, FIRST_RANGE)]
    while ranges[-1][1] < length:
        ranges.append((ranges[-1][1], 2 * ranges[-1][1]))
    return ranges


def _bytes_by_position(targets: Tensor, token_bytes: Tensor) -> Tensor:
    lengths = token_bytes[targets.clamp_min(0)]
    return torch.where(targets == IGNORE_INDEX, 0, lengths).sum(0).double()


PROMPTS = (
    "def __init__(self, ",
    "import os\nimport sys\n\n",
    'class Queue:\n    """',
    "    for key, value in ",
)


@torch.no_grad()
def greedy_text(
    model: CottentionForCausalLM, tokenizer: Tokenizer, prompt: str, num_tokens: int = 64
) -> str:
    """`prompt` and its greedy continuation by a float32 model on the CPU.

    Computes the whole window again for every token.
    """
    ids = [end_of_text_id(tokenizer), *tokenizer.encode(prompt).ids]
    for _ in range(num_tokens):
        logits = logits_of(model, torch.tensor([ids[-model.config.window :]]), dtype=torch.float32)
        ids.append(int(logits[0, -1].argmax()))
    text: str = tokenizer.decode(ids)
    return text
