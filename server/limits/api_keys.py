"""Who may ask: API keys as bearer tokens.

Owns the comparison, what is open to everybody, and the 401. A request that was let in carries an
owner, so that what one key keeps here stays invisible to another. Knows no endpoint beyond paths.

Where keys come from: one by one, or a file of them.

Owns what such files may hold. Knows no request.
"""

import hashlib
import hmac
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from cottention.engine.errors import ConfigurationError
from cottention.server.config import ServerConfig
from cottention.server.http.body import parse_object
from cottention.server.http.errors import ApiError
from cottention.server.limits.key_limits import KeyLimits

OPEN_PATHS = frozenset({"/health", "/ready"})
METRICS_PATH = "/metrics"


def asks_for_key(path: str, config: ServerConfig) -> bool:
    """Whether a path is closed to those without a key."""
    if path == METRICS_PATH:
        return config.metrics_key is not None
    return path not in OPEN_PATHS and bool(config.api_key or config.api_key_file)


class ApiKeyMiddleware:
    """Middleware that asks for a key: one of these, and for the figures the one of their own."""

    def __init__(self, app: ASGIApp, owners: Collection[str], metrics_key: str | None) -> None:
        """Keys are known by their digests alone, as `owner_by` tells them."""
        self._app = app
        self._owners = owners
        self._metrics_owners = [] if metrics_key is None else [owner_by(metrics_key)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on one request, or refuse it before its body is read."""
        if scope["type"] == "http" and (owners := self._asked_for(scope["path"])):
            owner = _owner(Headers(scope=scope).get("authorization", ""), owners)
            if owner is None:
                await refusal().response()(scope, receive, send)
                return
            scope.setdefault("state", {})["owner"] = owner
        await self._app(scope, receive, send)

    def _asked_for(self, path: str) -> Collection[str]:
        if path == METRICS_PATH:
            return self._metrics_owners
        return () if path in OPEN_PATHS else self._owners


def refusal() -> ApiError:
    """The 401, as clients know it; litellm tells it by OpenAI's first four words."""
    return ApiError(
        401,
        'Incorrect API key provided, or none: send "Authorization: Bearer KEY"',
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def owner_by(key: str) -> str:
    """What a key's sessions and account are kept under."""
    return hashlib.sha256(key.encode("utf-8", errors="replace")).hexdigest()


def _owner(authorization: str, owners: Collection[str]) -> str | None:
    """Which key was sent, in as much time for any; None where it is none of them."""
    scheme, _, key = authorization.partition(" ")
    given = owner_by(key.strip())
    matches = [hmac.compare_digest(given, each) for each in owners]
    return given if any(matches) and scheme.lower() == "bearer" else None


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
