"""Bits per byte on the held-out files: the number that models are compared by.

Owns the arithmetic of the score. Knows nothing of training. Total −log₂ p of every held-out token,
each once, in the windows of `data.held_out_windows`, divided by the bytes of the held-out files.

Greedy text from a model just trained, for a person to look at.

Owns the simplest of decoders: the last window of the text again for every token. Not for serving.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from cottention.engine.models.gptj.model import CottentionForCausalLM
from cottention.engine.training.data import (
    NO_TARGET,
    SourceFile,
    Windows,
    end_of_text_id,
    held_out_windows,
    padded_batches,
)
from cottention.engine.training.forward import logits_of, nats

FIRST_BORDER = 128


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The held-out files, ready to be scored: windows, bytes in all and bytes of each token id."""

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
    """Bits per byte over everything, and by the position of the token in its window."""

    bits_per_byte: float
    by_position: dict[str, float]


def token_lengths(tokenizer: Tokenizer) -> Tensor:
    """Bytes that each id stands for, int64: a byte-level token has one character for each byte."""
    pieces = tokenizer.get_vocab()
    lengths = torch.zeros(len(pieces), dtype=torch.int64)
    for piece, token in pieces.items():
        lengths[token] = len(piece)
    return lengths


@torch.no_grad()
def score(
    model: CottentionForCausalLM, held_out: HeldOut, *, dtype: torch.dtype, batch: int = 4
) -> Score:
    """Score the model in evaluation mode, products in `dtype`; its mode is put back after."""
    was_training = model.training
    model.eval()
    device = model.lm_head.weight.device
    longest = max(window.inputs.shape[1] for window in held_out.windows)
    total_nats = torch.zeros(longest, dtype=torch.float64)
    total_bytes = torch.zeros(longest, dtype=torch.float64)
    for group in padded_batches(held_out.windows, batch):
        logits = logits_of(model, group.inputs.to(device), dtype=dtype)
        length = group.inputs.shape[1]
        total_nats[:length] += nats(logits, group.targets.to(device)).double().sum(0).cpu()
        total_bytes[:length] += _bytes_by_position(group.targets, held_out.token_bytes)
    model.train(was_training)
    return summarise(total_nats, total_bytes, held_out.num_bytes)


def summarise(total_nats: Tensor, total_bytes: Tensor, num_bytes: int) -> Score:
    """From sums by position in the window, float64 [T]; the total divides by the files' bytes."""
    return Score(
        float(total_nats.sum()) / math.log(2) / num_bytes,
        {
            f"{start}-{stop}": float(total_nats[start:stop].sum() / total_bytes[start:stop].sum())
            / math.log(2)
            for start, stop in position_ranges(len(total_nats))
        },
    )


def position_ranges(length: int) -> list[tuple[int, int]]:
    """0–128, 128–256, 256–512 and so on, each twice as far, until `length` is covered."""
    ranges = [(0, FIRST_BORDER)]
    while ranges[-1][1] < length:
        ranges.append((ranges[-1][1], 2 * ranges[-1][1]))
    return ranges


def _bytes_by_position(targets: Tensor, token_bytes: Tensor) -> Tensor:
    lengths = token_bytes[targets.clamp_min(0)]
    return torch.where(targets == NO_TARGET, 0, lengths).sum(0).double()


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
    """`prompt` and what the model, on the CPU in float32, thinks most likely to follow it."""
    ids = [end_of_text_id(tokenizer), *tokenizer.encode(prompt).ids]
    for _ in range(num_tokens):
        logits = logits_of(model, torch.tensor([ids[-model.config.window :]]), dtype=torch.float32)
        ids.append(int(logits[0, -1].argmax()))
    text: str = tokenizer.decode(ids)
    return text
