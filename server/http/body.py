"""A request's body, from bytes on the wire to one JSON object.

Owns the size limit and what is no JSON object: other encodings, a name twice, more nesting or more
digits than Python reads. Does not know what the object means.
"""

import asyncio
import json
from collections import Counter
from typing import Any

from starlette.requests import Request

from cottention.server.http.errors import ApiError, invalid

MIN_BYTES_PER_SECOND = 10_000
PLAIN = "identity"
NOT_JSON = "the body must be a JSON object"


async def read_body(request: Request, max_bytes: int, patience: float) -> bytes:
    """All of the body. Raises ApiError 413 as soon as it is longer than `max_bytes`.

    Raises ApiError 408 where it is slower than MIN_BYTES_PER_SECOND and `patience` is over, and 415
    where it says that it is encoded.
    """
    if (encoding := request.headers.get("content-encoding", PLAIN).lower()) != PLAIN:
        raise _encoded(encoding)
    if announced_bytes(request) > max_bytes:
        raise _too_long(max_bytes)
    body = bytearray()
    began = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(began + patience) as time:
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_long(max_bytes)
                time.reschedule(began + patience + len(body) / MIN_BYTES_PER_SECOND)
    except TimeoutError:
        raise _too_slow() from None
    return bytes(body)


def announced_bytes(request: Request) -> int:
    """How long the body says that it is; 0 where it does not."""
    announced = request.headers.get("content-length", "0")
    return int(announced) if announced.isdecimal() else 0


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object that `raw` holds. Raises ApiError 400."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise invalid(None, f"the body is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise invalid(None, f"{NOT_JSON}; it is not JSON: {error}") from None
    except RecursionError:
        raise invalid(None, f"{NOT_JSON}; it is nested too deeply") from None
    except ValueError:  # Python's own limit on the digits of an integer
        raise invalid(None, "the body has a number with too many digits") from None
    if not isinstance(value, dict):
        raise invalid(None, f"{NOT_JSON}; it is {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A JSON value as a message may quote it: short, and no container's contents."""
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
    """Whether every character of it is one; JSON can escape half of a UTF-16 pair."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _too_long(max_bytes: int) -> ApiError:
    message = f"the body is longer than the limit of {max_bytes} bytes"
    return ApiError(413, message, code="body_too_large")


def _encoded(encoding: str) -> ApiError:
    message = f"the body has Content-Encoding {shown(encoding)}; send it as it is, without"
    return ApiError(415, message, code="unsupported_encoding")


def _too_slow() -> ApiError:
    message = f"the body comes slower than {MIN_BYTES_PER_SECOND} bytes a second"
    return ApiError(408, message, code="too_slow", headers={"Connection": "close"})


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise invalid(twice, f"the body has {shown(twice)} twice")
    return found
