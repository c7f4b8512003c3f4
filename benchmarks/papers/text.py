"""The text of the language models: the shipped model's corpus in a small vocabulary."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from cottention.engine.training.data import (
    read_corpus,
    standard_library,
    token_stream,
    train_tokenizer,
    without_character_tables,
)
from cottention.engine.training.evaluate import HeldOut


@dataclass(frozen=True, slots=True)
class Text:
    """The training text int64 [N] and the held-out code, in windows of `context` tokens.

    held_out_stream: the same held-out code in a row, int64 [N].
    """

    stream: Tensor
    held_out: HeldOut
    held_out_stream: Tensor


@functools.cache
def small_text(vocab_size: int, context: int, folder: Path) -> Text:
    """Text of the standard library; tokenizer and ids are kept in `folder` by corpus and size."""
    corpus = read_corpus(standard_library())
    name = f"{corpus.sha256[:16]}-{vocab_size}"
    tokenizer_file, ids_file = folder / f"{name}.json", folder / f"{name}.pt"
    if ids_file.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        stream = torch.load(ids_file, weights_only=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer((file.text for file in corpus.training), vocab_size)
        stream = token_stream(tokenizer, corpus.training)
        tokenizer.save(str(tokenizer_file))
        torch.save(stream, ids_file)
    code = without_character_tables(corpus.held_out)
    return Text(stream, HeldOut.of(tokenizer, code, context), token_stream(tokenizer, code))
