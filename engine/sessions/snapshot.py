"""A session as one self-contained binary, and back.

Owns the format: a magic word, the sha256 of all that follows, a safetensors file. Does not know
where snapshots are kept or sent.

There is one spelling of every state. A reader takes no more from a header than the few numbers on
which the spelling depends, spells the header that they make, and wants those very bytes: whatever
else a header may claim, twice or nested or out of place, is refused without being understood.

Bytes of a sealed safetensors file: its checksum, its header's text, its tensors' places.

Owns how they are laid out and taken apart again. Does not know what is in them.

    magic word | sha256 of all that follows | header's length, header | tensors without gaps
"""

import ctypes
import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cottention.engine.errors import SnapshotError, SnapshotMismatchError
from cottention.engine.sessions.fingerprint import Fingerprint
from cottention.engine.state.context_window import ContextPolicy, ContextSchedule
from cottention.engine.state.session_state import SessionState
from cottention.engine.state.spec import StateSpec

MAGIC = b"COTTSESS"
MAX_HEADER_BYTES = 16_384

_BODY_AT = len(MAGIC) + hashlib.sha256().digest_size
_WIDTHS = {"F32": 4, "I32": 4, "U8": 1}


class Entry(NamedTuple):
    """One tensor's place; bytes start..end behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def seal(parts: Sequence[bytes]) -> bytes:
    """A header and its tensors' bytes under a checksum."""
    checksum = hashlib.sha256()
    for part in parts:
        checksum.update(part)
    return b"".join([MAGIC, checksum.digest(), *parts])


def unseal(raw: bytes) -> tuple[bytes, memoryview]:
    """Header, its length in front, and the tensors' bytes. Raises SnapshotError."""
    if len(raw) < _BODY_AT + 8 or not raw.startswith(MAGIC):
        raise SnapshotError("these bytes are not a session's snapshot")
    body = memoryview(raw)[_BODY_AT:]
    if hashlib.sha256(body).digest() != raw[len(MAGIC) : _BODY_AT]:
        raise SnapshotError("the snapshot is cut or damaged: its checksum does not agree")
    (size,) = struct.unpack_from("<Q", body)
    if size > min(MAX_HEADER_BYTES, len(body) - 8):
        raise SnapshotError("the snapshot's header is longer than a header can be")
    return bytes(body[: 8 + size]), body[8 + size :]


def placed(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> dict[str, Entry]:
    """(name, dtype, shape) of each, one behind the other."""
    entries: dict[str, Entry] = {}
    end = 0
    for name, dtype, shape in tensors:
        start = end
        size = _WIDTHS[dtype]
        for width in shape:
            size *= width
        end += size
        entries[name] = Entry(dtype, shape, start, end)
    return entries


def header_text(metadata: Mapping[str, str], entries: Mapping[str, Entry]) -> bytes:
    """The one spelling of a header, its length in front."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, entry in entries.items():
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def ints_to_bytes(dtype: str, values: Sequence[int]) -> bytes:
    """A list of int32 or of bytes."""
    return bytes(values) if dtype == "U8" else struct.pack(f"<{len(values)}i", *values)


def ints_at(data: memoryview, entry: Entry) -> Sequence[int]:
    """What `ints_to_bytes` wrote; of bytes, bytes."""
    part = data[entry.start : entry.end]
    return bytes(part) if entry.dtype == "U8" else struct.unpack(f"<{len(part) // 4}i", part)


def floats_to_bytes(row: Tensor) -> bytes:
    """A float32 tensor on the host. Not by numpy, which need not be there."""
    assert row.dtype == torch.float32
    row = row.detach().contiguous()
    return ctypes.string_at(row.data_ptr(), row.nbytes)


def floats_at(data: memoryview, entry: Entry) -> Tensor:
    """What `floats_to_bytes` wrote, in memory of its own. SnapshotError: NaN or infinite."""
    part = bytearray(data[entry.start : entry.end])
    row = torch.frombuffer(part, dtype=torch.float32).view(entry.shape)
    if not torch.stack(row.aminmax()).isfinite().all():
        raise SnapshotError("the snapshot's rows are not all finite numbers")
    return row


FORMAT_VERSION = 2
MAX_NUMBER = 2**62  # of a header: Python writes out no number of any length

_LISTS = {
    "pending": "I32",
    "recent": "I32",
    "count_ids": "I32",
    "counts": "I32",
    "undecoded": "U8",
}
_NUMBERS = {
    "position": "[0-9]{1,19}",
    "context_policy": ".*",
}
"""What a header says in words, and how each may be spelled."""


class _Sizes(NamedTuple):
    """All that a header depends on beside the model.

    context_policy: name of the grid that the rows are on. lengths: elements of each of `_LISTS`.
    """

    position: int
    context_policy: str
    has_rows: bool
    lengths: Mapping[str, int]


class SnapshotCodec:
    """States of one model to bytes and back, equal bytes for equal states.

    num_ids: ids of the tokenizer; a snapshot with others is refused. grids: by context policy.
    window: how many of its last ids a session holds.
    """

    def __init__(
        self,
        fingerprints: Fingerprint,
        spec: StateSpec,
        num_ids: int,
        grids: Mapping[ContextPolicy, ContextSchedule],
        window: int,
    ) -> None:
        self.context_schedules = grids
        self._policies = {grid.name: policy for policy, grid in grids.items()}
        self._window = window
        self._num_ids = num_ids
        self._row_shapes: list[tuple[int, ...]] = [spec.state_shape]
        if spec.has_denominator:
            self._row_shapes.append(spec.denominator_shape)
        self._expected = {"format": str(FORMAT_VERSION), **asdict(fingerprints)}

    def encode(self, state: SessionState) -> bytes:
        """One self-contained binary."""
        assert not state.rows or [tuple(row.shape) for row in state.rows] == self._row_shapes
        counts = sorted(state.counts.items())
        lists: dict[str, Sequence[int]] = {
            "pending": state.pending,
            "recent": state.recent,
            "count_ids": [token_id for token_id, _ in counts],
            "counts": [count for _, count in counts],
            "undecoded": state.undecoded,
        }
        lengths = {name: len(values) for name, values in lists.items()}
        name = self.context_schedules[state.context_policy].name
        sizes = _Sizes(state.position, name, bool(state.rows), lengths)
        return seal(
            [
                self._header(sizes),
                *(floats_to_bytes(row) for row in state.rows),
                *(ints_to_bytes(_LISTS[name], values) for name, values in lists.items()),
            ]
        )

    def decode(self, raw: bytes) -> SessionState:
        """The state of a snapshot; sizes are held against `raw` before they are used.

        SnapshotMismatchError: it is whole and of another model or format. SnapshotError: it is not.
        """
        header, data = unseal(raw)
        sizes = self._sizes(header)
        entries = self._entries(sizes)
        if header != self._header(sizes):
            raise SnapshotError("the snapshot's header is not one that this server writes")
        if len(data) != entries["undecoded"].end:
            raise SnapshotError("the snapshot's sizes are not those of its header")
        lists = {name: ints_at(data, entries[name]) for name in _LISTS}
        self._check(sizes, lists)
        return SessionState(
            rows=tuple(floats_at(data, entries[name]) for name in entries if name not in _LISTS),
            position=sizes.position,
            pending=tuple(lists["pending"]),
            recent=tuple(lists["recent"]),
            counts=dict(zip(lists["count_ids"], lists["counts"], strict=True)),
            undecoded=bytes(lists["undecoded"]),
            context_policy=self._policies[sizes.context_policy],
        )

    def _entries(self, sizes: _Sizes) -> dict[str, Entry]:
        """Every tensor of the file, in the order of its bytes."""
        shapes = self._row_shapes if sizes.has_rows else []
        tensors: list[tuple[str, str, tuple[int, ...]]] = [
            *((f"row.{i}", "F32", shape) for i, shape in enumerate(shapes)),
            *((name, dtype, (sizes.lengths[name],)) for name, dtype in _LISTS.items()),
        ]
        return placed(tensors)

    def _header(self, sizes: _Sizes) -> bytes:
        """The one spelling of a header for these sizes."""
        metadata = {name: str(getattr(sizes, name)) for name in _NUMBERS}
        metadata = self._expected | metadata
        return header_text(metadata, self._entries(sizes))

    def _sizes(self, header: bytes) -> _Sizes:
        """The numbers that a header is spelled from. Raises both errors."""
        try:
            found = json.loads(header[8:])
            metadata = found["__metadata__"]
            policy = str(metadata["context_policy"])
            self._check_fit({name: str(metadata[name]) for name in self._expected}, policy)
            for name, spelling in _NUMBERS.items():
                if not re.fullmatch(spelling, metadata[name]):
                    raise ValueError(name)
            lengths = {name: int(found[name]["shape"][0]) for name in _LISTS}
            position = int(metadata["position"])
            sizes = _Sizes(position, policy, "row.0" in found, lengths)
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
            raise SnapshotError("the snapshot's header cannot be read") from error
        if min(lengths.values()) < 0 or max(position, *lengths.values()) > MAX_NUMBER:
            raise SnapshotError("the snapshot's sizes are out of range")
        return sizes

    def _check_fit(self, found: Mapping[str, str], policy: str) -> None:
        faults = [
            f"{name} (here {expected!r}, in the snapshot {found[name][:400]!r})"
            for name, expected in self._expected.items()
            if found[name] != expected
        ]
        if policy not in self._policies:
            here = ", ".join(map(repr, self._policies))
            faults.append(f"context_policy (here {here}, in the snapshot {policy[:200]!r})")
        if faults:
            raise SnapshotMismatchError(f"the snapshot differs in {', '.join(faults)}")

    def _check(self, sizes: _Sizes, lists: Mapping[str, Sequence[int]]) -> None:
        """Values that no session has, though the sizes are right."""
        ids, counts = lists["count_ids"], lists["counts"]
        all_ids = (*lists["pending"], *lists["recent"], *ids)
        if all_ids and not 0 <= min(all_ids) <= max(all_ids) < self._num_ids:
            raise SnapshotError("the snapshot has ids that the tokenizer has not")
        if len(ids) != len(counts) or any(a >= b for a, b in pairwise(ids)):
            raise SnapshotError("the snapshot's counts are not one for each id, in order")
        if counts and min(counts) < 0:
            raise SnapshotError("the snapshot has counts below zero")
        num_held = sizes.position + len(lists["pending"])
        if len(lists["recent"]) != min(num_held, self._window):
            raise SnapshotError("the snapshot has not the recent ids that its age asks for")
        if sizes.position and not sizes.has_rows:
            raise SnapshotError("the snapshot has a position and no rows")
