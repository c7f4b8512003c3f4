"""Who may ask: API keys as bearer tokens.

Owns the comparison, what is open to everybody, and the 401. A request that was let in carries an
owner, so that what one key keeps here stays invisible to another. Knows no endpoint beyond paths.
"""

import hashlib
import hmac
from collections.abc import Collection

from cottention.server.errors import ApiError
from cottention.server.settings import ServerConfig
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS = frozenset({"/health", "/ready"})
METRICS_PATH = "/metrics"


def asks_for_key(path: str, config: ServerConfig) -> bool:
    """Whether a path is closed to those without a key."""
    if path == METRICS_PATH:
        return config.metrics_key is not None
    return path not in OPEN_PATHS and bool(config.api_key or config.api_key_file)


class Keys:
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
