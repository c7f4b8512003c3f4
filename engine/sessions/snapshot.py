"""A session's snapshot: one self-contained binary, written and read by `SnapshotCodec`.

    magic word | sha256 of all that follows | header's length, header | tensors without gaps

What follows the checksum is a safetensors file. Every state has exactly one valid encoding. A
reader takes from a header only the numbers that determine it, writes the header that they make, and
requires those very bytes: whatever else a header contains is refused without being interpreted.

A recipe is a snapshot without the state's tensors, where these follow from the ids that it has.
"""

import codecs
import ctypes
import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from cottention.engine.config import DType
from cottention.engine.errors import (
    NonFiniteStateError,
    SnapshotError,
    SnapshotMismatchError,
    StateTooLargeError,
)
from cottention.engine.sessions.fingerprint import Fingerprint, split_layout
from cottention.engine.state.context_window import ContextPolicy, ContextSchedule
from cottention.engine.state.session_state import MAX_PENDING, MAX_UNDECODED, SessionState
from cottention.engine.state.spec import StateDType, StateSpec

MAGIC = b"COTTSESS"
MAX_HEADER_BYTES = 16_384

_BODY_AT = len(MAGIC) + hashlib.sha256().digest_size
_WIDTHS = {"F32": 4, "I32": 4, "U8": 1}
DTYPES = frozenset(get_args(DType)) - {"auto"}
"""Of weights, as --dtype takes them."""

_STATE_DTYPES: dict[StateDType, str] = {"float32": "F32"}


PIECE = 32_000
"""Elements; torch divides 32,768 and more."""


class Entry(NamedTuple):
    """One tensor: its bytes are start..end, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def seal(parts: Sequence[bytes]) -> bytes:
    """Join a header and its tensors' bytes behind magic word and checksum."""
    checksum = hashlib.sha256()
    for part in parts:
        checksum.update(part)
    return b"".join([MAGIC, checksum.digest(), *parts])


def unseal(raw: bytes) -> tuple[bytes, memoryview]:
    """Check and split: (header with its length in front, tensors' bytes). Raises SnapshotError."""
    if len(raw) < _BODY_AT + 8 or not raw.startswith(MAGIC):
        raise SnapshotError("these bytes are not a session snapshot")
    body = memoryview(raw)[_BODY_AT:]
    if hashlib.sha256(body).digest() != raw[len(MAGIC) : _BODY_AT]:
        raise SnapshotError("the snapshot is truncated or damaged: its checksum does not match")
    (size,) = struct.unpack_from("<Q", body)
    if size > min(MAX_HEADER_BYTES, len(body) - 8):
        raise SnapshotError("the snapshot's header is too long")
    return bytes(body[: 8 + size]), body[8 + size :]


def placed(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> dict[str, Entry]:
    """Entries of tensors (name, dtype, shape) that are laid out without gaps, in this order."""
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
    """The only valid header of these, with its length in front."""
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
    """Encode a list of int32, or of bytes."""
    return bytes(values) if dtype == "U8" else struct.pack(f"<{len(values)}i", *values)


def ints_at(data: memoryview, entry: Entry) -> Tensor:
    """What `ints_to_bytes` wrote, as a copy: int32 or, of U8, uint8."""
    part = bytearray(data[entry.start : entry.end])
    dtype = torch.uint8 if entry.dtype == "U8" else torch.int32
    return torch.frombuffer(part, dtype=dtype) if part else torch.empty(0, dtype=dtype)


def is_finite(row: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    One pass in pieces that torch does not divide among threads: waiting for these, beside a step
    that uses them all, would take longer than the pass.
    """
    pieces = row.reshape(-1).split(PIECE)
    return bool(
        torch.stack([each for piece in pieces for each in piece.aminmax()]).isfinite().all()
    )


def floats_to_bytes(row: Tensor) -> bytes:
    """Encode a float32 tensor on the host, without numpy: the engine does not require it."""
    assert row.dtype == torch.float32
    row = row.detach().contiguous()
    return ctypes.string_at(row.data_ptr(), row.nbytes)


def floats_at(data: memoryview, entry: Entry) -> Tensor:
    """Decode what `floats_to_bytes` wrote, as a copy. Raises SnapshotError for NaN or infinity."""
    part = bytearray(data[entry.start : entry.end])
    row = torch.frombuffer(part, dtype=torch.float32).view(entry.shape)
    if not is_finite(row):
        raise SnapshotError("the snapshot's state has values that are not finite")
    return row


FORMAT_VERSION = 3
"""Of the whole encoding. Snapshots of other versions are refused, older ones too."""

MAX_NUMBER = 2**62  # in a header: Python limits the digits of the integers that it prints

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
"""A header's metadata beside format and fingerprints, and the pattern of each value."""


class _Sizes(NamedTuple):
    """All that a header depends on beside the model.

    context_policy: name of the state's ContextSchedule. lengths: elements of each of `_LISTS`.
    """

    position: int
    context_policy: str
    has_rows: bool
    lengths: Mapping[str, int]


class SnapshotCodec:
    """Encodes and decodes sessions of one model; equal states have equal bytes.

    num_ids: ids of the tokenizer; a snapshot with others is refused. window: recent ids that a
    session holds. max_nbytes: bytes of the largest snapshot. writes_recipes: `encode` leaves out
    tensors that follow from the ids; `decode` reads both forms. max_encoded: bytes of the largest
    snapshot that `encode` may write; None: unlimited.
    """

    def __init__(
        self,
        fingerprints: Fingerprint,
        spec: StateSpec,
        num_ids: int,
        context_schedules: Mapping[ContextPolicy, ContextSchedule],
        window: int,
        *,
        writes_recipes: bool = False,
        max_encoded: int | None = None,
    ) -> None:
        self.writes_recipes = writes_recipes
        self._max_encoded = max_encoded
        self.context_schedules = context_schedules
        self._policies = {each.name: policy for policy, each in context_schedules.items()}
        self._window = window
        self._num_ids = num_ids
        self._rows = [
            (f"row.{tensor.name}", _STATE_DTYPES[tensor.dtype], tensor.shape)
            for tensor in spec.tensors
        ]
        self._expected = asdict(fingerprints)
        self._max_lengths = {
            "pending": MAX_PENDING,
            "recent": window,
            "count_ids": num_ids,
            "counts": num_ids,
            "undecoded": MAX_UNDECODED,
        }
        longest = self._entries(_Sizes(0, "", True, self._max_lengths))
        self.max_nbytes = _BODY_AT + 8 + MAX_HEADER_BYTES + longest["undecoded"].end

    def stored_form(self, state: SessionState) -> SessionState:
        """What `encode` writes of a session: its recipe, where it may and can be one.

        What was cut in the first turn after a recipe has no rows yet, and stays one.
        """
        is_recipe = self.writes_recipes or (state.position > 0 and not state.rows)
        return (state.recipe() if is_recipe else None) or state

    def encode(self, state: SessionState) -> bytes:
        """The snapshot of a session. NonFiniteStateError: a value of its rows is not finite.

        StateTooLargeError: it would have more than `max_encoded` bytes.

        Whatever is stored has come through here or through `decode`.
        """
        if not all(map(is_finite, state.rows)):
            raise NonFiniteStateError(
                "the state after these tokens has values that are not finite, and is not stored:"
                " the session is as it was before; the model cannot process this input"
            )
        assert not state.rows or [row.shape for row in state.rows] == [at for *_, at in self._rows]
        state = self.stored_form(state)
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
        header = self._header(sizes)
        nbytes = _BODY_AT + len(header) + self._entries(sizes)["undecoded"].end
        if self._max_encoded is not None and nbytes > self._max_encoded:
            raise StateTooLargeError(
                f"the session's state has {nbytes} bytes, and {self._max_encoded} are stored at"
                " most (--max-stored-state): the session is as it was before"
            )
        return seal(
            [
                header,
                *(floats_to_bytes(row) for row in state.rows),
                *(ints_to_bytes(_LISTS[name], values) for name, values in lists.items()),
            ]
        )

    def decode(self, raw: bytes) -> SessionState:
        """The session of a snapshot, which `encode` could have written.

        Sizes are checked against what a session may have, and against `raw`, before anything is
        unpacked. What takes time runs without the interpreter's lock: hashes, copies and the
        checks of long lists.

        Raises SnapshotMismatchError for a snapshot of another model, dtype or format, SnapshotError
        for bytes that are damaged or no snapshot, or a state that no session has.
        """
        header, data = unseal(raw)
        sizes = self._sizes(header)
        entries = self._entries(sizes)
        if header != self._header(sizes):
            raise SnapshotError("the snapshot's header has another form than this server writes")
        if len(data) != entries["undecoded"].end:
            raise SnapshotError("the snapshot's length differs from the sizes in its header")
        lists = {name: ints_at(data, entries[name]) for name in _LISTS}
        self._check(sizes, lists)
        return SessionState(
            rows=tuple(floats_at(data, entries[name]) for name in entries if name not in _LISTS),
            position=sizes.position,
            pending=tuple(lists["pending"].tolist()),
            recent=tuple(lists["recent"].tolist()),
            counts=dict(zip(lists["count_ids"].tolist(), lists["counts"].tolist(), strict=True)),
            undecoded=bytes(lists["undecoded"].tolist()),
            context_policy=self._policies[sizes.context_policy],
        )

    def _entries(self, sizes: _Sizes) -> dict[str, Entry]:
        """All tensors of the file, in order."""
        tensors: list[tuple[str, str, tuple[int, ...]]] = [
            *(self._rows if sizes.has_rows else []),
            *((name, dtype, (sizes.lengths[name],)) for name, dtype in _LISTS.items()),
        ]
        return placed(tensors)

    def _header(self, sizes: _Sizes) -> bytes:
        """The only valid header for these sizes."""
        metadata = {name: str(getattr(sizes, name)) for name in _NUMBERS}
        metadata = {"format": str(FORMAT_VERSION)} | self._expected | metadata
        return header_text(metadata, self._entries(sizes))

    def _sizes(self, header: bytes) -> _Sizes:
        """Parse a header. Raises SnapshotError and SnapshotMismatchError."""
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
            position, has_rows = int(metadata["position"]), self._rows[0][0] in found
            sizes = _Sizes(position, policy, has_rows, lengths)
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
            raise SnapshotError("the snapshot's header cannot be read") from error
        if min(lengths.values()) < 0 or max(position, *lengths.values()) > MAX_NUMBER:
            raise SnapshotError("the snapshot's sizes are out of range")
        self._check_sizes(sizes)
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
        if not faults:
            return
        made_with, own = split_layout(found["layout"]), split_layout(self._expected["layout"])
        if len(faults) == 1 and made_with.tensors == own.tensors and made_with.dtype in DTYPES:
            raise SnapshotMismatchError(
                f"the state was made with --dtype {made_with.dtype}, and this server has its"
                f" weights in {own.dtype}: start it with --dtype {made_with.dtype} to go on from"
                " the state, or open a new session and send its text again"
            )
        raise SnapshotMismatchError(
            "the state was made by another model, or with other settings: it differs in"
            f" {', '.join(faults)}. Use it with a server of those, or open a new session and send"
            " its text again"
        )

    def _check_sizes(self, sizes: _Sizes) -> None:
        """Refuse sizes that no session can have. Raises SnapshotError."""
        lengths = sizes.lengths
        for name, most in self._max_lengths.items():
            if lengths[name] > most:
                raise SnapshotError(
                    f"the snapshot's {name} has {lengths[name]} elements; at most {most} are"
                    " allowed"
                )
        num_held = sizes.position + lengths["pending"]
        if lengths["count_ids"] != lengths["counts"] or lengths["counts"] > num_held:
            raise SnapshotError("the snapshot's counts are not one for each id that it holds")
        if lengths["recent"] != min(num_held, self._window):
            raise SnapshotError("the snapshot's number of recent ids does not match its position")
        policy = self._policies[sizes.context_policy]
        is_recipe = policy == "renew" and lengths["pending"] == lengths["recent"]
        if bool(sizes.position) != sizes.has_rows and (sizes.has_rows or not is_recipe):
            raise SnapshotError("the snapshot has a position and no state, or a state without one")
        if num_held and not lengths["pending"]:
            raise SnapshotError("the snapshot's last id is not among its pending ids")
        if lengths["undecoded"] and not num_held:
            raise SnapshotError("the snapshot has bytes of a character and no id that they are of")

    def _check(self, sizes: _Sizes, lists: Mapping[str, Tensor]) -> None:
        """Refuse values that no session can have. Raises SnapshotError."""
        pending, recent = lists["pending"], lists["recent"]
        ids, counts = lists["count_ids"], lists["counts"]
        for each in (pending, recent, ids):
            if len(each) and not 0 <= int(each.min()) <= int(each.max()) < self._num_ids:
                raise SnapshotError("the snapshot has ids that the tokenizer does not have")
        if not bool((ids[1:] > ids[:-1]).all()):
            raise SnapshotError("the snapshot's counts are not in increasing order of their ids")
        if bool((counts < 0).any()):
            raise SnapshotError("the snapshot has negative counts")
        num_both = min(len(pending), len(recent))
        if num_both and not torch.equal(pending[-num_both:], recent[-num_both:]):
            raise SnapshotError("the snapshot's recent ids do not end with its pending ids")
        counted = torch.zeros(self._num_ids, dtype=torch.bool)
        counted[ids.long()] = True
        if not all(bool(counted[each.long()].all()) for each in (pending, recent)):
            raise SnapshotError("the snapshot has ids without a count")
        if int(counts.sum()) > sizes.position + len(pending):
            raise SnapshotError("the snapshot's counts are more than the ids that it holds")
        undecoded = bytes(lists["undecoded"].tolist())
        if codecs.getincrementaldecoder("utf-8")("replace").decode(undecoded):
            raise SnapshotError("the snapshot's undecoded bytes do not begin a character")


def _check_format(found: str) -> None:
    if found != str(FORMAT_VERSION):
        raise SnapshotMismatchError(
            f"the snapshot has format {found[:100]!r}; this server reads format"
            f" {str(FORMAT_VERSION)!r} only. Use it with the version of the server that wrote it,"
            " or open a new session and send its text again"
        )
