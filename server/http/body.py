"""A request's body, with limits on its size and time, and how messages quote JSON values.

Encoded bodies are refused.
"""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from cottention.server.http.body_memory import Held
from cottention.server.http.errors import ApiError

IDENTITY = "identity"


@dataclass(frozen=True, slots=True)
class Pace:
    """How slowly a body may come.

    seconds: limit of each pause. bytes_per_second: how many it has to average from `seconds` after
    its beginning on, so that one of n bytes has come after seconds + n / bytes_per_second.
    """

    seconds: float
    bytes_per_second: int

    def deadline(self, began: float, now: float, num_bytes: int) -> float:
        """When the next bytes must have come, where the last of `num_bytes` came at `now`."""
        return min(now + self.seconds, began + self.seconds + num_bytes / self.bytes_per_second)


async def read_body(request: Request, max_bytes: int, pace: Pace, held: Held) -> bytes:
    """All of the body, counted by `held` from its announced length on.

    Raises ApiError 413 as soon as it is larger than `max_bytes`, 408 where it comes more slowly
    than `pace` allows, whatever its length and whether that is announced, 415 where it is encoded,
    and 429 where there is no room for it.
    """
    if (encoding := request.headers.get("content-encoding", IDENTITY).lower()) != IDENTITY:
        raise _encoded(encoding)
    if announced_bytes(request) > max_bytes:
        raise _too_large(max_bytes)
    held.at_least(announced_bytes(request))
    body = bytearray()
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        async with asyncio.timeout_at(pace.deadline(began, began, 0)) as timeout:
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
                held.at_least(len(body))
                timeout.reschedule(pace.deadline(began, loop.time(), len(body)))
    except TimeoutError:
        raise _too_slow(pace) from None
    return bytes(body)


def announced_bytes(request: Request) -> int:
    """The body's Content-Length; 0 without one."""
    announced = request.headers.get("content-length", "0")
    return int(announced) if announced.isdecimal() else 0


def shown(value: Any) -> str:
    """A JSON value as messages quote it: short, and containers without their contents."""
    match value:
        case dict():
            return "an object"
        case list():
            return "a list"
        case float():
            return repr(value)
        case str() if not is_text(value):
            return "text with a lone surrogate"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def is_text(value: str) -> bool:
    """Whether `value` is valid Unicode; JSON can escape half of a UTF-16 surrogate pair."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _too_large(max_bytes: int) -> ApiError:
    message = f"the body is larger than the limit of {max_bytes} bytes; send a smaller one"
    return ApiError(413, message, code="body_too_large")


def _encoded(encoding: str) -> ApiError:
    message = f"Content-Encoding {shown(encoding)} is not supported; send the body unencoded"
    return ApiError(415, message, code="unsupported_encoding")


def _too_slow(pace: Pace) -> ApiError:
    message = (
        f"the body came too slowly: it may not pause for {pace.seconds:g} s, and after the first"
        f" {pace.seconds:g} s it must average {pace.bytes_per_second} bytes per second"
    )
    return ApiError(408, message, code="too_slow", headers={"Connection": "close"})
