"""Bytes of a sealed safetensors file: its checksum, its header's text, its tensors' places.

Owns how they are laid out and taken apart again. Does not know what is in them.

    magic word | sha256 of all that follows | header's length, header | tensors without gaps
"""

import ctypes
import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from cottention.engine.errors import SnapshotError
from torch import Tensor

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
