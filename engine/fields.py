"""A config.json and its single fields, checked. `model_config.py` says which a model has.

Everything here raises ModelFolderError; `where` is the file's name for the message.
"""

import json
from pathlib import Path
from typing import Any

from cottention.engine.errors import ModelFolderError


def read(path: Path) -> dict[str, Any]:
    """The object in a file of a model folder."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFolderError(
            f"{path.parent} has no {path.name}: give a Hugging Face model folder"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ModelFolderError(f"{path} must hold a JSON object")
    return raw


def size(
    raw: dict[str, Any], name: str, where: str, default: int | None = None, least: int = 1
) -> int:
    """A whole number from `least`; the default where it is null or absent."""
    value = raw.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ModelFolderError(
            f"{where}: {name} must be a whole number from {least}, it is {value!r}"
        )
    return value


def switch(raw: dict[str, Any], name: str, where: str) -> bool:
    """true or false; false where it is absent."""
    value = raw.get(name, False)
    if not isinstance(value, bool):
        raise ModelFolderError(f"{where}: {name} must be true or false, it is {value!r}")
    return value


def epsilon(raw: dict[str, Any], name: str, where: str, default: float) -> float:
    """A number between 0 and 1, which are excluded."""
    value = raw.get(name, default)
    if not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ModelFolderError(f"{where}: {name} must be a number between 0 and 1, it is {value!r}")
    return float(value)


def token_ids(raw: dict[str, Any], name: str, where: str) -> tuple[int, ...]:
    """A whole number, a list of them, or null."""
    value = raw.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(each) is int for each in ids):
        raise ModelFolderError(
            f"{where}: {name} must be a whole number, a list of them or null, it is {value!r}"
        )
    return tuple(ids)
