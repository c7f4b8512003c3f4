"""JSON in pieces, for responses that are too long to be encoded or held as a whole.

An encoder of the standard library holds the interpreter until it is done: what it is given at a
time must be short, or the event loop stands still, from whichever thread it is called.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from starlette.responses import Response, StreamingResponse

Encode = Callable[[Any], str]

BATCH_ITEMS = 128
BATCH_CHARACTERS = 4 * 1024
"""Elements of a list that are encoded at a time, at most, and characters that they should have"""

TEXT_CHARACTERS = 64 * 1024
BLOCK_CHARACTERS = 64 * 1024
"""Characters of a text, and of a response, that are made at a time"""


@dataclass(frozen=True, slots=True)
class LongList:
    """A JSON array: elements that are encoded already, then values that are made as they are read.

    encoded: as `encode_elements` returns them.
    """

    values: Iterable[Any]
    encoded: Sequence[str] = ()


def _as_list(value: Any) -> Any:
    """For values that an encoder does not know."""
    if isinstance(value, LongList) and not value.encoded:
        return list(value.values)
    raise TypeError(f"{type(value).__name__} is no JSON")


compact = json.JSONEncoder(separators=(",", ":"), default=_as_list).encode
"""Encodes JSON in ASCII: some clients take U+2028 and similar characters for a line end."""

encode_unicode = json.JSONEncoder(
    separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_as_list
).encode
"""Encodes JSON with characters as they are."""


def json_pieces(value: Any, encode: Encode) -> Iterator[str]:
    """The JSON text of a value in short pieces. Dicts have strings as keys."""
    if isinstance(value, dict):
        yield "{"
        for place, (name, each) in enumerate(value.items()):
            yield f"{',' if place else ''}{encode(name)}:"
            yield from json_pieces(each, encode)
        yield "}"
    elif isinstance(value, LongList):
        yield from _array(value, encode)
    elif isinstance(value, (list, tuple)) and len(value) > BATCH_ITEMS:
        yield from _array(LongList(value), encode)
    elif isinstance(value, str) and len(value) > TEXT_CHARACTERS:
        yield '"'
        for start in range(0, len(value), TEXT_CHARACTERS):
            yield encode(value[start : start + TEXT_CHARACTERS])[1:-1]
        yield '"'
    else:
        yield encode(value)


def encode_elements(values: Iterable[Any], encode: Encode) -> Iterator[str]:
    """The elements of an array without its brackets, some of them at a time.

    How many depends on the size of those before: a token with 20 alternatives is 21 objects.
    """
    values, num = iter(values), 1
    while batch := list(islice(values, num)):
        text = encode(batch)[1:-1]
        yield text
        num = max(1, min(BATCH_ITEMS, len(batch) * BATCH_CHARACTERS // len(text)))


def _array(array: LongList, encode: Encode) -> Iterator[str]:
    separator = "["
    for elements in (array.encoded, encode_elements(array.values, encode)):
        for text in elements:
            yield f"{separator}{text}"
            separator = ","
    yield "]" if separator == "," else "[]"


def json_response(pieces: Iterator[str], *, is_long: bool) -> Response:
    """A response of JSON text: at once, or made in a thread block by block as the client reads."""
    if is_long:
        return StreamingResponse(_in_thread(pieces), media_type="application/json")
    return Response("".join(pieces), media_type="application/json")


def object_response(fields: Mapping[str, Any], *, is_long: bool) -> Response:
    """A response of one object."""
    return json_response(json_pieces(dict(fields), encode_unicode), is_long=is_long)


async def _in_thread(pieces: Iterator[str]) -> AsyncIterator[bytes]:
    while block := await asyncio.to_thread(_block, pieces):
        yield block


def _block(pieces: Iterator[str]) -> bytes:
    """The next pieces, in UTF-8; empty at the end."""
    parts, size = [], 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size >= BLOCK_CHARACTERS:
            break
    return "".join(parts).encode()
