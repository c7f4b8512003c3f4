"""A session's snapshot: one self-contained binary, written and read by `SnapshotCodec`.

    magic word | sha256 of all that follows | header's length, header | tensors without gaps

What follows the checksum is a safetensors file. Every state has exactly one valid encoding. A
reader takes from a header only the numbers that determine it, writes the header that they make, and
requires those very bytes: whatever else a header contains is refused without being interpreted.
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
from cottention.engine.state.event_log import EventLog
from cottention.engine.state.session_state import SessionState
from cottention.engine.state.spec import StateDType, StateSpec

MAGIC = b"COTTSESS"
MAX_HEADER_BYTES = 16_384

_BODY_AT = len(MAGIC) + hashlib.sha256().digest_size
_WIDTHS = {"F32": 4, "I32": 4, "U8": 1}
_STATE_DTYPES: dict[StateDType, str] = {"float32": "F32"}


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


FORMAT_VERSION = 3
"""Of the whole encoding. Snapshots of other versions are refused, older ones too."""

MAX_NUMBER = 2**62  # of a header: Python writes out no number of any length

_LISTS = {
    "pending": "I32",
    "recent": "I32",
    "count_ids": "I32",
    "counts": "I32",
    "event_sizes": "I32",
    "undecoded": "U8",
    "events": "U8",
}
_NUMBERS = {
    "position": "[0-9]{1,19}",
    "context_policy": ".*",
    "turn": "([0-9a-f]{16})?",
    "first_event": "[0-9]{1,19}",
}
"""What a header says in words, and how each may be spelled."""


class _Sizes(NamedTuple):
    """All that a header depends on beside the model.

    context_policy: name of the grid that the rows are on. lengths: elements of each of `_LISTS`.
    """

    position: int
    context_policy: str
    turn: str
    first_event: int
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
        self._rows = [
            (f"row.{tensor.name}", _STATE_DTYPES[tensor.dtype], tensor.shape)
            for tensor in spec.tensors
        ]
        self._expected = asdict(fingerprints)

    def encode(self, state: SessionState) -> bytes:
        """One self-contained binary."""
        assert not state.rows or [row.shape for row in state.rows] == [at for *_, at in self._rows]
        counts = sorted(state.counts.items())
        lists: dict[str, Sequence[int]] = {
            "pending": state.pending,
            "recent": state.recent,
            "count_ids": [token_id for token_id, _ in counts],
            "counts": [count for _, count in counts],
            "event_sizes": [len(event) for event in state.outbox.events],
            "undecoded": state.undecoded,
            "events": b"".join(state.outbox.events),
        }
        lengths = {name: len(values) for name, values in lists.items()}
        name = self.context_schedules[state.context_policy].name
        turn, first = state.outbox.turn, state.outbox.first
        sizes = _Sizes(state.position, name, turn, first, bool(state.rows), lengths)
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
        if len(data) != entries["events"].end:
            raise SnapshotError("the snapshot's sizes are not those of its header")
        lists = {name: ints_at(data, entries[name]) for name in _LISTS}
        self._check(sizes, lists)
        events = lists["event_sizes"], bytes(lists["events"])
        outbox = EventLog.unpacked(sizes.turn, sizes.first_event, *events)
        return SessionState(
            rows=tuple(floats_at(data, entries[name]) for name in entries if name not in _LISTS),
            position=sizes.position,
            pending=tuple(lists["pending"]),
            recent=tuple(lists["recent"]),
            counts=dict(zip(lists["count_ids"], lists["counts"], strict=True)),
            undecoded=bytes(lists["undecoded"]),
            outbox=outbox,
            context_policy=self._policies[sizes.context_policy],
        )

    def _entries(self, sizes: _Sizes) -> dict[str, Entry]:
        """Every tensor of the file, in the order of its bytes."""
        tensors: list[tuple[str, str, tuple[int, ...]]] = [
            *(self._rows if sizes.has_rows else []),
            *((name, dtype, (sizes.lengths[name],)) for name, dtype in _LISTS.items()),
        ]
        return placed(tensors)

    def _header(self, sizes: _Sizes) -> bytes:
        """The one spelling of a header for these sizes."""
        metadata = {name: str(getattr(sizes, name)) for name in _NUMBERS}
        metadata = {"format": str(FORMAT_VERSION)} | self._expected | metadata
        return header_text(metadata, self._entries(sizes))

    def _sizes(self, header: bytes) -> _Sizes:
        """The numbers that a header is spelled from. Raises both errors."""
        try:
            found = json.loads(header[8:])
            metadata = found["__metadata__"]
            _check_format(str(metadata["format"]))
            policy = str(metadata["context_policy"])
            self._check_fit({name: str(metadata[name]) for name in self._expected}, policy)
            for name, spelling in _NUMBERS.items():
                if not re.fullmatch(spelling, metadata[name]):
                    raise ValueError(name)
            lengths = {name: int(found[name]["shape"][0]) for name in _LISTS}
            position, first_event = int(metadata["position"]), int(metadata["first_event"])
            has_rows, turn = self._rows[0][0] in found, metadata["turn"]
            sizes = _Sizes(position, policy, turn, first_event, has_rows, lengths)
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
            raise SnapshotError("the snapshot's header cannot be read") from error
        if min(lengths.values()) < 0 or max(position, first_event, *lengths.values()) > MAX_NUMBER:
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


def _check_format(found: str) -> None:
    if found != str(FORMAT_VERSION):
        raise SnapshotMismatchError(
            f"the snapshot has format {found[:100]!r}; this server reads format"
            f" {str(FORMAT_VERSION)!r} only. Use it with the version of the server that wrote it,"
            " or open a new session and send its text again"
        )
