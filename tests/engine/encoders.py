"""Small encoders for tests: the golden one with a tokenizer, and others made of its weights."""

import functools
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from cottention.engine.models.weight_files import read_weights

_FOLDER = Path(__file__).parents[1] / "data" / "golden" / "cottention-bert"

WORDS = ["the", "cat", "dog", "sat", "on", "mat", "a", "big", "##ger", "##s", ".", ",", "!"]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MASK = "[MASK]"


def read_raw(folder: Path) -> dict[str, Any]:
    """A folder's config.json."""
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return raw


def changed_folder(
    source: Path, target: Path, weights: Mapping[str, Tensor], **settings: Any
) -> Path:
    """A model folder with these weights, and `source`'s config.json with some settings changed."""
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(read_raw(source) | settings), encoding="utf-8")
    save_file({name: weight.contiguous() for name, weight in weights.items()}, target / _WEIGHTS)
    return target


_WEIGHTS = "model.safetensors"


def write_vocabulary(folder: Path, size: int = 300) -> None:
    """A vocab.txt of a few words and, for the rest, every letter and numbered words."""
    letters = [chr(ord("a") + i) for i in range(26)]
    tokens = [*SPECIALS, *WORDS, *letters[1:], *(f"##{each}" for each in letters if each != "s")]
    tokens += [f"w{i}" for i in range(size - len(tokens))]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")


def encoder_folder(kind: str = "cottention") -> Path:
    """The golden encoder with attention of this kind and a WordPiece vocabulary."""
    return _encoder_folder(kind)


@functools.cache
def _encoder_folder(kind: str) -> Path:
    target = Path(_made().name) / kind
    weights = read_weights(_FOLDER)
    if kind != "cottention":
        weights = {k: v for k, v in weights.items() if not k.endswith("norm_const")}
    changed_folder(_FOLDER, target, weights, attention_type=kind)
    write_vocabulary(target)
    return target


@functools.cache
def _made() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="cottention-encoders-")


def copied(folder: Path, target: Path) -> Path:
    """A writable copy."""
    shutil.copytree(folder, target)
    return target
