"""API keys: where they are configured, and the middleware that requires one as a bearer token.

A request with a key has an owner, a digest of the key: sessions and cached prompts of one owner are
invisible to others.
"""

import hashlib
import hmac
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from cottention.engine.errors import ConfigurationError
from cottention.engine.sessions.store.protocol import Quotas
from cottention.engine.text.files import not_utf8
from cottention.server.config import ServerConfig
from cottention.server.http.errors import ApiError
from cottention.server.http.json_body import parse_object
from cottention.server.limits.key_limits import KeyLimits

OPEN_PATHS = frozenset({"/health", "/ready"})
METRICS_PATH = "/metrics"
PAGE_PATH = "/ui"
"""The folder of the page's files, which have no secret and ask for the key themselves."""

DOCS_PATH = "/docs"
"""The endpoints' description for people, and the folder of its files: the same holds for them."""


def requires_key(path: str, config: ServerConfig) -> bool:
    """Whether requests of `path` need a key."""
    if path == METRICS_PATH:
        return config.metrics_key is not None
    return not _is_open(path) and bool(config.api_key or config.api_key_file)


def _is_open(path: str) -> bool:
    folders = (f"{PAGE_PATH}/", f"{DOCS_PATH}/")
    return path in OPEN_PATHS or path in ("/", DOCS_PATH) or path.startswith(folders)


def checks_host(path: str, config: ServerConfig) -> bool:
    """Whether requests of `path` must be addressed to a host that is allowed.

    A web page does not know the server's keys, so that there is nothing to check with them.
    """
    has_keys = bool(config.api_key or config.api_key_file)
    return path not in OPEN_PATHS and not has_keys and not requires_key(path, config)


class ApiKeyMiddleware:
    """Requires one of the keys, and for /metrics the key of its own; sets the request's owner."""

    def __init__(self, app: ASGIApp, owners: Collection[str], metrics_key: str | None) -> None:
        """owners: digests of the keys, as `owner_id` makes them; empty requires none."""
        self._app = app
        self._owners = owners
        self._metrics_owners = [] if metrics_key is None else [owner_id(metrics_key)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; without a valid key it is refused before its body is read."""
        if scope["type"] == "http" and (owners := self._owners_for(scope["path"])):
            owner = _matching_owner(_authorization(scope), owners)
            if owner is None:
                await invalid_api_key().response()(scope, receive, send)
                return
            scope.setdefault("state", {})["owner"] = owner
        await self._app(scope, receive, send)

    def _owners_for(self, path: str) -> Collection[str]:
        if path == METRICS_PATH:
            return self._metrics_owners
        return () if _is_open(path) else self._owners


def invalid_api_key() -> ApiError:
    """The 401; litellm recognises it by its first four words, which are OpenAI's."""
    return ApiError(
        401,
        'Incorrect API key provided, or none: send "Authorization: Bearer KEY"',
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def owner_id(key: str) -> str:
    """The owner that a key stands for: its SHA-256 in hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", errors="replace")).hexdigest()


def _authorization(scope: Scope) -> str:
    """The Authorization header; for Anthropic's endpoints X-Api-Key stands in for it."""
    headers = Headers(scope=scope)
    own = headers.get("x-api-key") if scope["path"].startswith("/v1/messages") else None
    return headers.get("authorization", "" if own is None else f"Bearer {own}")


def _matching_owner(authorization: str, owners: Collection[str]) -> str | None:
    """The owner whose key was sent, or None; the time taken tells nothing about the keys."""
    scheme, _, key = authorization.partition(" ")
    owner = owner_id(key.strip())
    matches = [hmac.compare_digest(owner, each) for each in owners]
    return owner if any(matches) and scheme.lower() == "bearer" else None


MAX_WEIGHT = 1000

NAME_LENGTH = 8
"""How many digits of its digest the log shows for a key without a name."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key, its name in the log ("" shows the start of its digest), its limits and its weight.

    weight: the key's part of the slots, in proportion to those of the other keys that use them.
    """

    secret: str
    name: str
    limits: KeyLimits
    weight: int = 1


def load_api_keys(config: ServerConfig) -> tuple[ApiKey, ...]:
    """The keys of --api-key and --api-key-file. Raises ConfigurationError.

    A file whose text begins with a bracket is JSON, whatever its name.
    """
    limits = KeyLimits.from_config(config)
    path = config.api_key_file
    if not all(map(_is_sendable, config.api_key)):
        raise ConfigurationError(f"--api-key: each key must be {_SENDABLE}")
    keys = tuple(ApiKey(each, "", limits) for each in config.api_key)
    if path is not None:
        source, text = f"--api-key-file {path}", _read_text(path)
        parse = _parse_json if text.lstrip().startswith(("{", "[")) else _parse_lines
        keys += tuple(parse(text, limits, source))
        if len(keys) == len(config.api_key):
            raise ConfigurationError(f"{source} has no key in it; write one on a line of its own")
    return keys


def session_quotas(keys: Iterable[ApiKey], config: ServerConfig) -> Quotas:
    """The quota of each owner; without keys there is one for all clients.

    An owner whose key is no longer accepted has the limits of the flags.
    """
    default = KeyLimits.from_config(config).quota
    quotas = {owner_id(key.secret): key.limits.quota for key in keys}
    return lambda owner: quotas.get(owner, default)


_SENDABLE = "printable ASCII without spaces around it"

_MIN_LINE_LENGTH = 8
_NOT_IN_LINES = frozenset(" {}\"'")
"""What a line of keys cannot hold: the file is in another format, whose parts would become keys."""


def _is_sendable(key: str) -> bool:
    return key.isascii() and key.isprintable() and key.strip() == key != ""


def _read_text(path: str) -> str:
    try:
        raw = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(
            f"--api-key-file {path} cannot be read: {reason}; give it a file that this process may"
            " read, with a key on each line, or JSON"
        ) from None
    fault = not_utf8(raw)
    if fault is not None:
        message = f"--api-key-file {path} cannot be read: {fault}; save it as UTF-8"
        raise ConfigurationError(message)
    return raw.decode("utf-8-sig")


def _parse_lines(text: str, limits: KeyLimits, source: str) -> Iterator[ApiKey]:
    """One key per line; lines whose first character but for spaces is # are comments.

    Raises ConfigurationError with the number of a line that cannot be a key, and without its text.
    """
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if not line or line.startswith("#"):
            continue
        is_key = _is_sendable(line) and _NOT_IN_LINES.isdisjoint(line)
        if not is_key or len(line) < _MIN_LINE_LENGTH:
            raise ConfigurationError(
                f"{source}: line {number} cannot be a key; a key is at least {_MIN_LINE_LENGTH}"
                " characters of printable ASCII without spaces, quotes or braces, alone on its"
                ' line; comments begin with #; for JSON the file must begin with "{"'
            )
        yield ApiKey(line, "", limits)


def _parse_json(text: str, limits: KeyLimits, source: str) -> Iterator[ApiKey]:
    """{"name": {"key": "...", "max_requests": 4}}; other limits are those of the flags.

    "weight" is 1 where there is none.
    """
    try:
        content = parse_object(text.encode())
    except ApiError as error:
        raise ConfigurationError(f"{source}: {error}") from None
    for place, (name, entry) in enumerate(content.items(), start=1):
        overrides: dict[str, Any] = dict(entry) if isinstance(entry, dict) else {}
        secret = overrides.pop("key", None)
        if not isinstance(secret, str):  # the name is not quoted, since it may be a key
            raise ConfigurationError(
                f'{source}: entry {place} must be "NAME": {{"key": "KEY"}}, with limits beside the'
                " key where it has some"
            )
        weight = overrides.pop("weight", 1)
        if type(weight) is not int or not 1 <= weight <= MAX_WEIGHT:
            raise ConfigurationError(
                f"{source}, {json.dumps(name)}: weight must be a whole number from 1 to"
                f" {MAX_WEIGHT}"
            )
        if not _is_sendable(secret):
            raise ConfigurationError(f"{source}, {json.dumps(name)}: the key must be {_SENDABLE}")
        own = limits.override(overrides, f"{source}, {json.dumps(name)}")
        yield ApiKey(secret, name, own, weight)
