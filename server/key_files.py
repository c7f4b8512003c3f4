"""Where keys come from: one by one, or a file of them.

Owns what such files may hold. Knows no request.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cottention.engine.errors import ConfigurationError
from cottention.server.body import parse_object
from cottention.server.errors import ApiError
from cottention.server.key_limits import KeyLimits
from cottention.server.settings import ServerConfig

NAME_LENGTH = 8
"""Digits of a key's digest that stand for it in the log, where it has no name of its own."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key, what the log calls its owner ("" is a part of its digest), and what it may."""

    secret: str
    name: str
    limits: KeyLimits


def api_keys(config: ServerConfig) -> tuple[ApiKey, ...]:
    """Keys given one by one and those of the file. Raises ConfigurationError."""
    limits = KeyLimits.of(config)
    path = config.api_key_file
    found = tuple(ApiKey(each, "", limits) for each in config.api_key)
    if path is not None:
        in_file = _named if path.endswith(".json") else _listed
        found += tuple(in_file(_text_of(path), limits, f"--api-key-file {path}"))
        if len(found) == len(config.api_key):
            raise ConfigurationError(f"--api-key-file {path} has no key in it")
    if not all(_can_be_sent(key.secret) for key in found):
        raise ConfigurationError("each --api-key must be printable ASCII without spaces around it")
    return found


def _can_be_sent(key: str) -> bool:
    return key.isascii() and key.isprintable() and key.strip() == key != ""


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--api-key-file {path} cannot be read: {error}") from None


def _listed(text: str, limits: KeyLimits, _where: str) -> Iterator[ApiKey]:
    """A line each."""
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            yield ApiKey(line.strip(), "", limits)


def _named(text: str, limits: KeyLimits, where: str) -> Iterator[ApiKey]:
    """{"name": {"key": "...", "max_requests": 4}}: what is not said is as the flags have it."""
    try:
        content = parse_object(text.encode())
    except ApiError as error:
        raise ConfigurationError(f"{where}: {error}") from None
    for name, given in content.items():
        known: dict[str, Any] = dict(given) if isinstance(given, dict) else {}
        secret = known.pop("key", None)
        if not isinstance(secret, str):
            raise ConfigurationError(f'{where}: {json.dumps(name)} must be {{"key": "..."}}')
        yield ApiKey(secret, name, limits.but(known, f"{where}, {json.dumps(name)}"))
