"""What a session's numbers mean only together with: the weights, the tokenizer, the state's layout.

Owns how each is told in a line of text. Does not know sessions or what a snapshot looks like.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from engine.model_config import ModelConfig
from engine.state_spec import StateSpec
from engine.weights import weight_files

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """weights, tokenizer: sha256 in hex, of the files. layout: the state's shape and types."""

    weights: str
    tokenizer: str
    layout: str

    @classmethod
    def of(cls, folder: Path, spec: StateSpec, dtype: str) -> Self:
        """Of a model folder that is served with weights in `dtype`. Raises ModelFolderError."""
        tokenizer = (folder / name for name in _TOKENIZER_FILES)
        return cls(
            weights=_sha256(weight_files(folder)),
            tokenizer=_sha256(path for path in tokenizer if path.is_file()),
            layout=_layout(spec, dtype) + _attention(ModelConfig.from_folder(folder)),
        )


def _layout(spec: StateSpec, dtype: str) -> str:
    return (
        f"layers={spec.layers} heads={spec.heads} V={spec.value_width} K={spec.key_width} float32"
        f" weights={dtype} denominator={spec.has_denominator}"
    )


def _attention(config: ModelConfig) -> str:
    """What config.json alone says of a state, for other kinds of attention than the first."""
    if config.attention_type == "cottention":
        return ""
    length = "" if config.max_exact_length is None else f" M={config.max_exact_length}"
    return f" attention={config.attention_type} rotary={config.rotary_dim}{length}"


def _sha256(paths: Iterable[Path]) -> str:
    """Of all the files, with their names; a file is never in memory as a whole."""
    whole = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.name} {digest}\n".encode())
    return whole.hexdigest()
