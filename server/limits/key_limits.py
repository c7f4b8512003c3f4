"""What one key may ask for: at a time, per minute and in one request.

Owns the names of the limits, as flags and in a file of keys, and the refusal of a request that asks
for too much. What a key has used is `accounts.py`'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from cottention.engine.errors import ConfigurationError
from cottention.server.config import ServerConfig
from cottention.server.generation.request import ParsedRequest
from cottention.server.http.errors import invalid

FLAGS = "key_"
"""What the names of the settings that hold for every key begin with."""


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """None is no limit; the server's own hold beside them."""

    max_requests: int | None = None
    max_tokens_per_minute: int | None = None
    max_body_bytes: int | None = None
    max_tokens: int | None = None
    max_n: int | None = None
    max_stop: int | None = None

    @classmethod
    def of(cls, config: ServerConfig) -> Self:
        """Those of the flags."""
        return cls(**{item.name: getattr(config, FLAGS + item.name) for item in fields(cls)})

    def but(self, given: Mapping[str, Any], where: str) -> Self:
        """These, but for what a file says of one key. Raises ConfigurationError."""
        names = [item.name for item in fields(self)]
        for name, value in given.items():
            if name not in names:
                raise ConfigurationError(
                    f"{where}: there is no {name}; there are {', '.join(names)}"
                )
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigurationError(f"{where}: {name} must be a whole number from 1, or null")
        return replace(self, **given)

    def check(self, request: ParsedRequest) -> None:
        """Raise ApiError 400 for a request that asks for more than one of this key may."""
        tries = "n" if request.params.n == request.body.n else "best_of"
        _check("max_tokens", request.params.max_tokens, self.max_tokens)
        _check(tries, request.params.n, self.max_n)
        _check("stop", len(request.body.stop), self.max_stop)


def least(server: int, own: int | None) -> int:
    """The tighter of the server's bound and a key's own."""
    return server if own is None else min(server, own)


def _check(param: str, value: int, most: int | None) -> None:
    if most is not None and value > most:
        raise invalid(param, f"{param} must be at most {most} with this key; it is {value}")
