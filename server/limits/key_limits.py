"""Limits of one API key: on concurrent requests, tokens per minute, and what one request asks for.

They come from flags for all keys, and from the key file for single ones. What a key has used is
counted in `rate_limit.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from cottention.engine.errors import ConfigurationError
from cottention.engine.sampling_params import shortened
from cottention.engine.sessions.store.protocol import Quota
from cottention.server.config import ServerConfig
from cottention.server.generation.request import ParsedRequest
from cottention.server.http.errors import invalid

CONFIG_PREFIX = "key_"
"""Each limit is also a setting for all keys, whose name begins with this."""


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """None is unlimited; the server's own limits hold as well."""

    max_requests: int | None = None
    max_tokens_per_minute: int | None = None
    max_body_bytes: int | None = None
    max_tokens: int | None = None
    max_n: int | None = None
    max_stop: int | None = None
    max_sessions: int | None = None
    max_session_bytes: int | None = None

    @classmethod
    def from_config(cls, config: ServerConfig) -> Self:
        """The limits that the settings give every key."""
        names = (item.name for item in fields(cls))
        return cls(**{name: getattr(config, CONFIG_PREFIX + name) for name in names})

    def override(self, limits: Mapping[str, Any], source: str) -> Self:
        """A copy with some limits replaced.

        Raises ConfigurationError, which begins with `source`, for unknown names and bad values.
        """
        names = [item.name for item in fields(self)]
        for name, value in limits.items():
            if name not in names:
                raise ConfigurationError(
                    f"{source}: there is no limit {name}; the limits are {', '.join(names)}"
                )
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigurationError(
                    f"{source}: {name} must be a whole number from 1, or null for no limit"
                )
        return replace(self, **limits)

    @property
    def quota(self) -> Quota:
        """What the key's sessions may take."""
        return Quota(self.max_sessions, self.max_session_bytes)

    def check(self, request: ParsedRequest) -> None:
        """Raise ApiError 400 if the request asks for more than this key allows."""
        params, num_prompts = request.params, len(request.prompts)
        if self.max_requests is not None and num_prompts * params.n > self.max_requests:
            allowed = f"at most {self.max_requests} with this key (max_requests)"
            raise invalid(
                "n" if num_prompts == 1 else "prompt",
                f"prompts times n must be {allowed}; it is {num_prompts * params.n}: ask for fewer",
            )
        _check("max_tokens", params.max_tokens, self.max_tokens)
        _check("n" if params.n == request.body.n else "best_of", params.n, self.max_n)
        num_stop = len(request.body.stop)
        if self.max_stop is not None and num_stop > self.max_stop:
            allowed = f"takes at most {self.max_stop} strings with this key"
            raise invalid("stop", f"stop {allowed}; it has {num_stop}")


def least(server: int, key: int | None) -> int:
    """The stricter of the server's limit and a key's."""
    return server if key is None else min(server, key)


def _check(param: str, value: int, limit: int | None) -> None:
    if limit is not None and value > limit:
        allowed = f"at least 1 and at most {limit} with this key"
        raise invalid(param, f"{param} must be {allowed}; it is {shortened(value)}")
