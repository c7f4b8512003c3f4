"""Which tokenizer a model has: RWKV's World vocabulary, or byte-level BPE."""

import os
from pathlib import Path

from cottention.engine.errors import ConfigurationError, ModelFolderError
from cottention.engine.text.base import BaseTokenizer
from cottention.engine.text.special_tokens import read_token_facts
from cottention.engine.text.tokenizer import Tokenizer
from cottention.engine.text.world_tokenizer import END_OF_TEXT, WorldTokenizer

VOCABULARIES = "rwkv_vocab_*.txt"
"""Names of World vocabularies in a folder, such as rwkv_vocab_v20230424.txt."""


def read_tokenizer(
    model: Path, chosen: str | None = None, max_ids: int | None = None
) -> BaseTokenizer:
    """The tokenizer in a model's folder or beside its single file, or the chosen one.

    chosen: a World vocabulary, or a folder of tokenizer files. max_ids: as in
    `Tokenizer.from_folder`. Raises ModelFolderError, and ConfigurationError for a choice that does
    not exist.
    """
    if chosen is None:
        return _in_folder(model, max_ids) if model.is_dir() else _beside(model)
    path = Path(os.path.expanduser(chosen))
    if os.path.isdir(path):
        return _in_folder(path, max_ids)
    if not os.path.lexists(path):
        raise ConfigurationError(
            f"--tokenizer {chosen} does not exist: give a World vocabulary, or a folder of"
            " tokenizer files"
        )
    return WorldTokenizer.from_file(path)


def _in_folder(folder: Path, max_ids: int | None) -> BaseTokenizer:
    found = sorted(folder.glob(VOCABULARIES))
    if not found:
        return Tokenizer.from_folder(folder, max_ids)
    return WorldTokenizer.from_file(found[0], _end_text(folder))


def _end_text(folder: Path) -> str | None:
    """What the folder's files call the end of text, such as <|rwkv_tokenizer_end_of_text|>.

    Other special tokens that they name, such as a blank line as eos_token, are ordinary text.
    """
    added = read_token_facts(folder, is_needed=False).added
    return next((each.token.content for each in added if each.token_id == END_OF_TEXT), None)


def _beside(file: Path) -> BaseTokenizer:
    found = sorted(file.parent.glob(VOCABULARIES))
    if found:
        return WorldTokenizer.from_file(found[0])
    raise ModelFolderError(
        f"{file} has no tokenizer: give its vocabulary, for RWKV's World models"
        " rwkv_vocab_v20230424.txt, with --tokenizer FILE, or put it beside the file"
    )
