"""The JSON object of a body, parsed without keeping the interpreter from other threads for long.

The standard library's scanner in C holds the interpreter until a whole text is parsed, and Python's
collector runs within it: a second for 4 MiB of empty lists, in which nobody else is served. Long
texts are therefore parsed value by value in Python. Refused are names given twice, and more
nesting, digits, names, lists and objects than there may be.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from json import decoder, scanner
from typing import Any

from cottention.server.http.body import shown
from cottention.server.http.errors import ApiError, invalid

NOT_AN_OBJECT = "the body must be a JSON object"

MAX_AT_ONCE = 64 * 1024
"""Characters of a whole text that is parsed in one go."""

MAX_NUMBERS = 8 * 1024
"""Characters of numbers that are parsed in one go within a longer text."""

MAX_CONTAINERS = 100_000
"""Lists and objects of one body: they take many times the bytes that they are sent with."""

MAX_NAMES = 10_000
"""Names of one object."""

ScanOnce = Callable[[str, int], tuple[Any, int]]
"""(text, place) → the value that begins there, and the place behind it."""

_NUMBERS = re.compile(rf"[-+.0-9eE, \t\r\n]{{256,{MAX_NUMBERS - 1}}},(?=[ \t\r\n]*[-0-9])")
"""A part of a list of numbers, up to a comma behind which there is another one."""


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`. Raises ApiError 400."""
    if not raw.strip():
        raise invalid(None, f"{NOT_AN_OBJECT}; it is empty: send {{}} to give no field")
    try:
        text = raw.decode("utf-8")
        if len(text) <= MAX_AT_ONCE:
            value = json.loads(text, object_pairs_hook=_object)
        else:
            value = json.loads(text, cls=_LongDecoder)
    except UnicodeDecodeError as error:
        raise invalid(None, f"the body is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise _not_json(str(error)) from None
    except RecursionError:
        raise invalid(None, f"{NOT_AN_OBJECT}; it is nested too deeply") from None
    except ValueError:  # Python's own limit on the digits of an integer
        raise invalid(None, "the body has a number with too many digits") from None
    if not isinstance(value, dict):
        raise invalid(None, f"{NOT_AN_OBJECT}; it is {shown(value)}")
    return value


class _LongDecoder(json.JSONDecoder):
    """For one text, with the standard library's scanner in Python; numbers go many at a time."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object, parse_int=_integer, parse_float=_float)
        self.parse_array = self._array
        self.scan_once = scanner.py_make_scanner(self)  # type: ignore[attr-defined]
        self._num_containers = 0

    def _array(self, text_and_place: tuple[str, int], scan_once: ScanOnce) -> tuple[list[Any], int]:
        """The list whose bracket is before the place, and the place behind it."""
        self._count()
        text, place = text_and_place
        values: list[Any] = []
        while numbers := _NUMBERS.match(text, place):
            try:
                values += json.loads(f"[{numbers[0]}0]")
            except json.JSONDecodeError as error:
                raise json.JSONDecodeError(error.msg, text, place + error.pos - 1) from None
            values.pop()
            place = numbers.end()
        more, place = decoder.JSONArray((text, place), scan_once)  # type: ignore[attr-defined]
        return (values + more if values else more), place

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self._count()
        return _object(pairs)

    def _count(self) -> None:
        self._num_containers += 1
        if self._num_containers > MAX_CONTAINERS:
            raise invalid(None, f"the body has more than {MAX_CONTAINERS} lists and objects")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_NAMES:
        raise invalid(
            None, f"an object in the body has {len(pairs)} names; it may have at most {MAX_NAMES}"
        )
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise invalid(repeated, f"the body has {shown(repeated)} twice; send it once")
    return found


def _integer(digits: str) -> int:
    return int(_ascii(digits))


def _float(digits: str) -> float:
    return float(_ascii(digits))


def _ascii(digits: str) -> str:
    """Raises ApiError 400 for digits of other scripts, which Python takes and JSON does not."""
    if not digits.isascii():
        raise _not_json("a number has other digits than 0 to 9")
    return digits


def _not_json(why: str) -> ApiError:
    return invalid(None, f"{NOT_AN_OBJECT}; it is not JSON: {why}")
