"""Who may ask: API keys as bearer tokens.

Owns the comparison, what is open to everybody, and the 401. A request that was let in carries an
owner, so that what one key keeps here stays invisible to another. Knows no endpoint beyond paths.
"""

import hashlib
import hmac
from collections.abc import Collection
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import ConfigurationError
from server.errors import ApiError
from server.settings import ServerConfig

OPEN_PATHS = frozenset({"/health", "/ready"})
METRICS_PATH = "/metrics"


def api_keys(config: ServerConfig) -> tuple[str, ...]:
    """Keys given one by one and those of the file, a line each. Raises ConfigurationError."""
    keys = config.api_key + _keys_in(config.api_key_file)
    if not all(key.isascii() and key.isprintable() and key.strip() == key != "" for key in keys):
        raise ConfigurationError("each --api-key must be printable ASCII without spaces around it")
    return keys


def asks_for_key(path: str, config: ServerConfig) -> bool:
    """Whether a path is closed to those without a key."""
    if path == METRICS_PATH:
        return config.metrics_key is not None
    return path not in OPEN_PATHS and bool(config.api_key or config.api_key_file)


def _keys_in(path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--api-key-file {path} cannot be read: {error}") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise ConfigurationError(f"--api-key-file {path} has no key in it")
    return keys


class Keys:
    """Middleware that asks for a key: one of `keys`, and for the figures the one of their own."""

    def __init__(self, app: ASGIApp, keys: Collection[str], metrics_key: str | None) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]
        self._metrics_digests = [] if metrics_key is None else [_digest(metrics_key)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on one request, or refuse it before its body is read."""
        if scope["type"] == "http" and (digests := self._asked_for(scope["path"])):
            owner = _owner(Headers(scope=scope).get("authorization", ""), digests)
            if owner is None:
                await refusal().response()(scope, receive, send)
                return
            scope.setdefault("state", {})["owner"] = owner
        await self._app(scope, receive, send)

    def _asked_for(self, path: str) -> list[bytes]:
        if path == METRICS_PATH:
            return self._metrics_digests
        return [] if path in OPEN_PATHS else self._digests


def refusal() -> ApiError:
    """The 401, as clients know it; litellm tells it by OpenAI's first four words."""
    return ApiError(
        401,
        'Incorrect API key provided, or none: send "Authorization: Bearer KEY"',
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _owner(authorization: str, digests: list[bytes]) -> str | None:
    """Which key was sent, in as much time for any; None where it is none of them."""
    scheme, _, key = authorization.partition(" ")
    given = _digest(key.strip())
    matches = [hmac.compare_digest(given, each) for each in digests]
    return given.hex() if any(matches) and scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", errors="replace")).digest()
