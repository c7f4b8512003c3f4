"""RWKV's World tokenizer: greedy longest match over the bytes of a text.

Its vocabulary is a text file of one entry per line, `id literal length`, where the literal is a
Python string or bytes literal. It is read from the model's folder or from a file that the user
names; literals are parsed, never evaluated.
"""

import ast
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Final

from tokenizers import AddedToken

from cottention.engine.errors import ModelFolderError
from cottention.engine.text.base import BaseTokenizer, overlaps
from cottention.engine.text.files import read_text

END_OF_TEXT: Final = 0
"""In no line of the file; decodes to nothing and ends a text."""

MAX_ENTRY_BYTES = 1024
MAX_IDS = 2**20

_PREFIX = 3
"""Entries are found by their first bytes and their length."""


class WorldTokenizer(BaseTokenizer):
    """The tokenizer of a vocabulary: bytes of an entry by its id, ids from 1 upwards.

    A text is encoded as UTF-8 as a whole: no pre-splitting, no normalisation, and an entry may end
    inside a character. The vocabulary itself has no spelling of the end of text.
    """

    def __init__(
        self,
        entries: dict[int, bytes],
        where: str,
        files: tuple[Path, ...] = (),
        end_text: str | None = None,
    ) -> None:
        """end_text: how the model's files spell the end of text, if they do, as templates write it.

        Raises ModelFolderError unless entries differ and there is one for each byte.
        """
        self._ids = {entry: token_id for token_id, entry in entries.items()}
        if len(self._ids) < len(entries):
            twice = next(i for i, entry in entries.items() if self._ids[entry] != i)
            raise ModelFolderError(f"{where}: the entry of id {twice} is there twice")
        if missing := [byte for byte in range(256) if bytes([byte]) not in self._ids]:
            raise ModelFolderError(
                f"{where} has no entry for {len(missing)} of the 256 bytes, such as"
                f" 0x{missing[0]:02x}, so that not every text has ids"
            )
        self._lengths = _lengths(self._ids)
        self.num_ids = max(entries) + 1
        self.token_bytes = [entries.get(token_id, b"") for token_id in range(self.num_ids)]
        self.written_bytes = [(end_text or "").encode(), *self.token_bytes[1:]]
        self.sampleable_ids = [END_OF_TEXT, *sorted(entries)]
        self._end_text = end_text
        self.added_tokens = {}
        if end_text is not None:
            self.added_tokens[END_OF_TEXT] = AddedToken(end_text, special=True)
        self.eos_token_id = END_OF_TEXT
        self.files = files

    @classmethod
    def from_file(cls, path: Path, end_text: str | None = None) -> "WorldTokenizer":
        """Read a vocabulary. Raises ModelFolderError."""
        return cls(dict(_entries(path)), str(path), (path,), end_text)

    def encode(self, text: str) -> list[int]:
        return self.encode_untrusted(text, (), (END_OF_TEXT,))

    def encode_untrusted(
        self, text: str, spans: Sequence[tuple[int, int]], control_ids: Collection[int]
    ) -> list[int]:
        if self._end_text is None:
            return self._longest(text)
        begins = [begin for begin, _ in spans]
        ids: list[int] = []
        at = 0
        for found in re.finditer(re.escape(self._end_text), text):
            is_forged = END_OF_TEXT in control_ids and overlaps(spans, begins, *found.span())
            if not is_forged:
                ids += [*self._longest(text[at : found.start()]), END_OF_TEXT]
                at = found.end()
        return ids + self._longest(text[at:])

    def _longest(self, text: str) -> list[int]:
        """Ids of the longest entries; the interpreter runs other threads in between."""
        raw = text.encode()
        find, lengths_of = self._ids.get, self._lengths.get
        ids: list[int] = []
        at, stop = 0, len(raw)
        while at < stop:
            for length in lengths_of(raw[at : at + _PREFIX], _SHORT):
                piece = raw[at : at + length]
                token_id = find(piece)
                if token_id is not None:
                    ids.append(token_id)
                    at += len(piece)
                    break
        return ids

    def framed(self, ids: list[int]) -> list[int]:
        return ids

    def id_to_token(self, token_id: int) -> str:
        """The entry's text; bytes that are no text by themselves as <0xE4>."""
        raw = self.written_bytes[token_id] if token_id < self.num_ids else b""
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in raw)


_SHORT = tuple(range(_PREFIX, 0, -1))
"""Lengths to try where no longer entry begins with these bytes."""


def _lengths(entries: Collection[bytes]) -> dict[bytes, tuple[int, ...]]:
    """For the first bytes of each longer entry: the lengths to try, the longest first."""
    found: dict[bytes, set[int]] = {}
    for entry in entries:
        if len(entry) > _PREFIX:
            found.setdefault(entry[:_PREFIX], set()).add(len(entry))
    return {first: (*sorted(lengths, reverse=True), *_SHORT) for first, lengths in found.items()}


def _entries(path: Path) -> Iterator[tuple[int, bytes]]:
    """The ids of a vocabulary file and their bytes. Lines end with LF or CR LF."""
    seen: set[int] = set()
    lines = read_text(path, "a World vocabulary").split("\n")
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line and number == len(lines):
            continue
        entry = _entry(line)
        if entry is None or entry[0] in seen:
            why = "is not: id, space, Python literal, space, length in bytes"
            if entry is not None:
                why = f"has an id that an earlier line has, {entry[0]}"
            raise ModelFolderError(f"{path} is not a World vocabulary: line {number} {why}")
        seen.add(entry[0])
        yield entry
    if not seen:
        raise ModelFolderError(f"{path} is not a World vocabulary: it is empty")


def _entry(line: str) -> tuple[int, bytes] | None:
    """Id and bytes of one line; None where it has another form."""
    begin, end = line.find(" "), line.rfind(" ")
    number, literal, length = line[:begin], line[begin + 1 : end], line[end + 1 :]
    if begin < 0 or not _is_count(number, MAX_IDS) or not _is_count(length, MAX_ENTRY_BYTES):
        return None
    if len(literal) > 4 * MAX_ENTRY_BYTES + 3:
        return None
    try:
        value = ast.literal_eval(literal)
        raw = value.encode() if isinstance(value, str) else value
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(raw, bytes) or len(raw) != int(length):
        return None
    return int(number), raw


def _is_count(text: str, most: int) -> bool:
    """Whether a text is a whole number from 1 to `most`."""
    return text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most
