"""What a session's numbers mean only together with: weights, tokenizer, arithmetic, state's layout.

Owns how each is told in a line of text. Does not know sessions or what a snapshot looks like.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from cottention.engine.models.checkpoint import weight_files
from cottention.engine.models.config import ModelConfig
from cottention.engine.state.spec import StateSpec

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")

_NOT_ARITHMETIC = {"bos_token_id", "eos_token_ids", "torch_dtype"}
"""Of a config.json: where texts begin and end, and how weights are stored; the layout has the type
that they are served in."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """weights, tokenizer: sha256 in hex, of the files. layout: the state's shape and types.

    config: what config.json says that changes a state's numbers, or what they mean.
    """

    weights: str
    tokenizer: str
    config: str
    layout: str

    @classmethod
    def of(cls, folder: Path, spec: StateSpec, dtype: str) -> Self:
        """Of a model folder that is served with weights in `dtype`. Raises ModelFolderError."""
        tokenizer = (folder / name for name in _TOKENIZER_FILES)
        return cls(
            weights=_sha256(weight_files(folder)),
            tokenizer=_sha256(path for path in tokenizer if path.is_file()),
            config=_config(ModelConfig.from_folder(folder)),
            layout=_layout(spec, dtype),
        )


def _config(model: ModelConfig) -> str:
    """Weights of the same bytes make other states under another rotary width or epsilon."""
    names = [item.name for item in fields(model) if item.name not in _NOT_ARITHMETIC]
    return " ".join(f"{name}={getattr(model, name)}" for name in names)


def _layout(spec: StateSpec, dtype: str) -> str:
    return (
        f"layers={spec.layers} heads={spec.heads} V={spec.value_width} K={spec.key_width} float32"
        f" weights={dtype} denominator={spec.has_denominator}"
    )


def _sha256(paths: Iterable[Path]) -> str:
    """Of all the files, with their names; a file is never in memory as a whole."""
    whole = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.name} {digest}\n".encode())
    return whole.hexdigest()
