"""What a session's state is only good with: these weights, this tokenizer, this layout.

Owns the digests of a model folder's files. Does not know sessions.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from engine.config import StateSpec

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """weights, tokenizer: sha256 in hex over names and bytes of the files. layout: of the rows."""

    weights: str
    tokenizer: str
    layout: str

    @classmethod
    def of(cls, folder: Path, spec: StateSpec, dtype: str) -> Self:
        """Of a model folder as it is served: `dtype` is what its weights are computed in."""
        shape = " ".join(f"{name}={value}" for name, value in asdict(spec).items())
        return cls(
            weights=_digest(folder, WEIGHTS),
            tokenizer=_digest(folder, TOKENIZER),
            layout=f"{shape} state=float32 weights={dtype}",
        )


def _digest(folder: Path, patterns: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            of_file = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {of_file}\n".encode())
    return digest.hexdigest()
