"""Text and models of the quality benchmarks: held-out code, and model folders in float32."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from cottention.engine.models.checkpoint import load_model
from cottention.engine.models.gptj.model import CottentionForCausalLM
from cottention.engine.models.registry import read_config
from cottention.engine.training.data import (
    read_corpus,
    standard_library,
    token_stream,
    without_character_tables,
)
from cottention.engine.training.evaluate import token_lengths


@dataclass(frozen=True, slots=True)
class LongText:
    """Ids int64 [N] of a text that repeats, and the number of bytes of each id."""

    ids: Tensor
    token_bytes: Tensor

    @classmethod
    def held_out(cls, folder: Path) -> "LongText":
        """All held-out code without character tables, in the tokens of a model folder."""
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        files = without_character_tables(read_corpus(standard_library()).held_out)
        return cls(token_stream(tokenizer, files)[:-1], token_lengths(tokenizer))

    def streams(self, count: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`count` evenly spaced streams: indices [length] of the inputs, and length + 1 ids."""
        for index in range(count):
            start = index * len(self.ids) // count
            places = (start + torch.arange(length + 1)) % len(self.ids)
            yield places[:-1], self.ids[places]


def load(folder: Path) -> CottentionForCausalLM:
    """The model of a folder in float32; softmax models too."""
    return load_model(folder, read_config(folder), torch.float32).eval()
