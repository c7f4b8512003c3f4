"""Text and JSON files as people save them: UTF-8 with or without a byte order mark.

Errors are ModelFolderError, in one line that names the file and what is wrong with it. What can be
served all the same is given to a `Report`. Loads neither torch nor tokenizers.
"""

import codecs
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cottention.engine.errors import ModelFolderError

_log = logging.getLogger(__name__)

Report = Callable[[str], None]
"""Takes one line about a file that is damaged, or that contradicts itself."""


def warn(message: str) -> None:
    """Log a warning."""
    _log.warning("%s", message)


def ignore(message: str) -> None:
    """Do nothing: for a file that is read a second time, and was or will be reported by another."""


_WIDE_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
"""Byte order marks of other encodings; UTF-32's begins with UTF-16's."""


def read_text(path: Path, kind: str = "text") -> str:
    """The text of a UTF-8 file, without a byte order mark; line ends are kept as they are.

    kind: what the file should be, for messages.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ModelFolderError(_missing(path)) from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelFolderError(f"{path} cannot be read as {kind}: {reason}") from None
    fault = not_utf8(raw)
    if fault is not None:
        raise ModelFolderError(f"{path} cannot be read as {kind}: {fault}; save it as UTF-8")
    return raw.decode("utf-8-sig")


def not_utf8(raw: bytes) -> str | None:
    """Why bytes are no text in UTF-8; None where they are."""
    for mark, name in _WIDE_MARKS:
        if raw.startswith(mark):
            return f"it is {name}"
    if b"\0" in raw:
        return "it has zero bytes, as UTF-16 has"
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 at byte {error.start}"
    return None


def read_json(path: Path, report: Report = warn) -> dict[str, Any]:
    """The object in a JSON file. A key that is there twice has its last value, and is reported."""
    content = parse_json(read_text(path, "JSON"), path, report)
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path} must hold a JSON object")
    return content


def parse_json(text: str, path: Path, report: Report = warn) -> Any:
    """The value of a JSON text that was read from `path`."""
    repeated: dict[str, None] = {}

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            repeated.update((name, None) for name in found if names.count(name) > 1)
        return found

    try:
        content = json.loads(text, object_pairs_hook=table)
    except (ValueError, RecursionError) as error:
        what = str(error) or type(error).__name__
        raise ModelFolderError(f"{path} cannot be read as JSON: {what}") from None
    if repeated:
        names = ", ".join(map(repr, list(repeated)[:8]))
        report(f"{path} has keys more than once, of which the last counts: {names}")
    return content


def read_optional_json(path: Path, report: Report = warn) -> dict[str, Any]:
    """The object in a file that a model can do without: empty where it is absent."""
    return read_json(path, report) if os.path.lexists(path) else {}


def read_side_json(path: Path, report: Report = warn) -> dict[str, Any]:
    """As `read_optional_json`; a file that is damaged is reported, and empty."""
    try:
        return read_optional_json(path, report)
    except ModelFolderError as error:
        report(f"{error}; the model is served without this file")
        return {}


def _missing(path: Path) -> str:
    if os.path.lexists(path):
        return f"{path} is a link to a file that does not exist"
    return f"{path.parent} has no {path.name}: give a Hugging Face model folder"
