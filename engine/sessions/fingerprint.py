"""Fingerprint of a served model: a session's state is valid only where all of it is equal.

Files are told apart by their sha256, the arithmetic and the state's layout by a line of text that a
message can show.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from cottention.engine.models.registry import read_config
from cottention.engine.models.weight_files import weight_files
from cottention.engine.state.spec import StateSpec
from cottention.engine.text.files import ignore


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """weights, tokenizer: sha256 in hex, of the files and their names.

    config: the fields of config.json that change a state's numbers, as the model's family lists
    them. layout: name, shape and dtype of each tensor of the state, and the weights' dtype.
    """

    weights: str
    tokenizer: str
    config: str
    layout: str

    @classmethod
    def of(cls, folder: Path, tokenizer_files: Iterable[Path], spec: StateSpec, dtype: str) -> Self:
        """Of a model that is served with weights in `dtype`. Raises ModelFolderError."""
        return cls(
            weights=_sha256(weight_files(folder)),
            tokenizer=_sha256(tokenizer_files),
            config=read_config(folder, ignore).arithmetic(),
            layout=_layout(spec, dtype),
        )


class Layout(NamedTuple):
    """The parts of a fingerprint's layout."""

    tensors: str
    dtype: str


def split_layout(layout: str) -> Layout:
    """The parts of a layout, and of what is none all of it as `tensors`."""
    tensors, _, dtype = layout.partition(_WEIGHTS)
    return Layout(tensors, dtype)


_WEIGHTS = " weights="


def _layout(spec: StateSpec, dtype: str) -> str:
    tensors = [
        f"{tensor.name}={'x'.join(map(str, tensor.shape))}:{tensor.dtype}"
        for tensor in spec.tensors
    ]
    return " ".join(tensors) + _WEIGHTS + dtype


def _sha256(paths: Iterable[Path]) -> str:
    """Of all the files, with their names; no file is read into memory as a whole."""
    whole = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.name} {digest}\n".encode())
    return whole.hexdigest()
