"""Token windows: shuffled ones for training, every held-out token once for the score.

Owns how a corpus becomes tensors of ids. Knows nothing of models. A window's state starts at zero
at its first token.

Letters: B windows, T tokens of one window.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from cottention.engine.errors import ConfigurationError
from cottention.engine.training.bpe import end_of_text_id
from cottention.engine.training.corpus import SourceFile
from tokenizers import Tokenizer
from torch import Tensor

NO_TARGET = -100
"""The target of a place behind a text's end: it is not scored."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Inputs and the tokens that follow them, both int64 [B, T]."""

    inputs: Tensor
    targets: Tensor


def token_stream(
    tokenizer: Tokenizer, files: Sequence[SourceFile], cut_every: int = 0, seed: int = 0
) -> Tensor:
    """All files in one row, int64 [N], each behind an end-of-text id and one more at the end.

    With `cut_every` each text is tokenised in pieces of about so many characters, as a prompt and
    what follows it are.
    """
    end = end_of_text_id(tokenizer)
    places = random.Random(seed)
    ids = [end]
    for file in files:
        pieces = cut(file.text, cut_every, places) if cut_every else [file.text]
        for encoded in tokenizer.encode_batch(pieces):
            ids.extend(encoded.ids)
        ids.append(end)
    return torch.tensor(ids)


def cut(text: str, mean: int, places: random.Random) -> list[str]:
    """`text` in pieces of `mean` characters on average; every other cut is moved behind a space."""
    pieces = []
    start = 0
    while start < len(text):
        stop = start + places.randint(1, 2 * mean)
        if places.random() < 0.5:
            stop = text.find(" ", stop) + 1 or len(text)
        pieces.append(text[start:stop])
        start = stop
    return pieces


def batches_per_epoch(stream: Tensor, context: int, batch: int) -> int:
    """Full batches that one pass gives, whatever its offset. ConfigurationError where none."""
    each = (len(stream) - 1 - context) // context // batch
    if each < 1:
        raise ConfigurationError(
            f"the text has {len(stream)} tokens, too few for a batch of {batch} windows of"
            f" {context}: give more text, or a smaller --batch-tokens or --context"
        )
    return each


def epoch_batch(stream: Tensor, context: int, batch: int, seed: int, step: int) -> Windows:
    """Batch number `step` of training: a function of its arguments alone, so runs can resume.

    Each pass over the stream cuts it at another random offset and shuffles the windows.
    """
    each = batches_per_epoch(stream, context, batch)
    epoch, index = divmod(step, each)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    offset = int(torch.randint(context, (), generator=generator))
    count = (len(stream) - 1 - offset) // context
    order = torch.randperm(count, generator=generator)[index * batch : (index + 1) * batch]
    places = (offset + order * context).unsqueeze(1) + torch.arange(context)
    return Windows(stream[places], stream[places + 1])


def held_out_windows(
    tokenizer: Tokenizer, files: Sequence[SourceFile], context: int
) -> list[Windows]:
    """Non-overlapping windows, each [1, up to `context`], that have every token as a target once.

    A file's first window starts behind an end-of-text id; each later one behind the token before
    it, which is all that it sees of what came earlier.
    """
    end = end_of_text_id(tokenizer)
    windows = []
    for encoded in tokenizer.encode_batch([file.text for file in files]):
        row = torch.tensor([end, *encoded.ids])
        for start in range(0, len(row) - 1, context):
            targets = row[start + 1 : start + 1 + context]
            inputs = row[start : start + len(targets)]
            windows.append(Windows(inputs.unsqueeze(0), targets.unsqueeze(0)))
    return windows


def padded_batches(windows: Sequence[Windows], batch: int) -> Iterator[Windows]:
    """Windows of like length together, `batch` at a time, short ones filled up behind their end."""
    ordered = sorted(windows, key=lambda window: -window.inputs.shape[1])
    for start in range(0, len(ordered), batch):
        group = ordered[start : start + batch]
        length = group[0].inputs.shape[1]
        yield Windows(
            torch.cat([_filled(window.inputs, length, 0) for window in group]),
            torch.cat([_filled(window.targets, length, NO_TARGET) for window in group]),
        )


def _filled(row: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(row, (0, length - row.shape[1]), value=value)
