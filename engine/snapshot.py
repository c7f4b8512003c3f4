"""A session's value to bytes that stand for themselves, and back where they fit.

Owns the format and every doubt about bytes from elsewhere. Does not know where they are kept or
whose they are.

    8 bytes "COTTSESS", 32 bytes sha256 over all that follows, a safetensors file:
        row.0, row.1   float32, the pool's rows in order; absent where all are zeros
        pending, recent, count_ids, counts   int32 [n]
        undecoded      uint8 [n]
        __metadata__   {"session": JSON}: format, position, context_policy, fingerprints

Nothing is allocated beyond what the input itself is long, nothing is executed, and the same value
always has the same bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from engine.config import StateSpec
from engine.errors import SnapshotError, SnapshotMismatchError
from engine.fingerprints import Fingerprints
from engine.session_state import SessionState

FORMAT_VERSION = 1
CONTEXT_POLICY = "exact"

_MAGIC = b"COTTSESS"
_START = len(_MAGIC) + 32
_MAX_HEADER_BYTES = 16 * 1024
_MAX_POSITION = 2**62
_LISTS = {
    "pending": torch.int32,
    "recent": torch.int32,
    "count_ids": torch.int32,
    "counts": torch.int32,
    "undecoded": torch.uint8,
}


class SnapshotCodec:
    """Of one model as it is served."""

    def __init__(self, fingerprints: Fingerprints, spec: StateSpec, num_ids: int) -> None:
        """num_ids: the tokenizer has ids from 0 to this less one."""
        shapes = [spec.state_shape, spec.denominator_shape]
        self._shapes: list[tuple[int, ...]] = shapes[: 1 + spec.has_denominator]
        self._num_ids = num_ids
        self._fits = {"format": FORMAT_VERSION, "context_policy": CONTEXT_POLICY}
        self._fits |= asdict(fingerprints)

    def encode(self, state: SessionState) -> bytes:
        """The value's one form in bytes."""
        ids = sorted(state.counts)
        lists = {
            "pending": state.pending,
            "recent": state.recent,
            "count_ids": ids,
            "counts": [state.counts[token_id] for token_id in ids],
            "undecoded": list(state.undecoded),
        }
        tensors = {name: torch.tensor(lists[name], dtype=kind) for name, kind in _LISTS.items()}
        tensors |= {f"row.{i}": row.contiguous() for i, row in enumerate(state.rows)}
        facts = json.dumps(self._fits | {"position": state.position}, sort_keys=True)
        body = save(tensors, {"session": facts})
        return _MAGIC + hashlib.sha256(body).digest() + body

    def decode(self, raw: bytes) -> SessionState:
        """The value that `raw` is.

        Raises SnapshotError for bytes that are none, SnapshotMismatchError for one of another
        model, layout or format; it names all that differs.
        """
        body = _checked(raw)
        facts = _facts(body)
        self._check_fits(facts)
        try:
            tensors = load(body)
        except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise SnapshotError(f"the snapshot's tensors cannot be read: {error}") from None
        return self._state(facts["position"], tensors)

    def _check_fits(self, facts: Mapping[str, Any]) -> None:
        differing = [
            f"{name} (here {mine}, in the snapshot {facts.get(name)!r:.200})"
            for name, mine in self._fits.items()
            if facts.get(name) != mine
        ]
        if differing:
            raise SnapshotMismatchError(f"the snapshot does not fit: {'; '.join(differing)}")
        position = facts.get("position")
        if type(position) is not int or not 0 <= position < _MAX_POSITION:
            raise SnapshotError("the snapshot's position is no whole number from 0")

    def _state(self, position: int, tensors: dict[str, Tensor]) -> SessionState:
        rows = self._rows(tensors, position)
        values = {name: _list(tensors, name, kind) for name, kind in _LISTS.items()}
        if tensors:
            raise SnapshotError(f"the snapshot has tensors that it should not: {[*tensors]!r:.200}")
        for name in ("pending", "recent", "count_ids"):
            if not all(0 <= token_id < self._num_ids for token_id in values[name]):
                raise SnapshotError(f"the snapshot's {name} has ids that the tokenizer has not")
        ids, counts = values["count_ids"], values["counts"]
        if len(ids) != len(counts) or ids != sorted(set(ids)) or min(counts, default=0) < 0:
            raise SnapshotError("the snapshot's counts are none")
        state = SessionState(
            rows=rows,
            position=position,
            pending=tuple(values["pending"]),
            recent=tuple(values["recent"]),
            counts=dict(zip(ids, counts, strict=True)),
            undecoded=bytes(values["undecoded"]),
        )
        _check_together(state)
        return state

    def _rows(self, tensors: dict[str, Tensor], position: int) -> tuple[Tensor, ...]:
        """All the rows, or none where no id is in them."""
        if not position and not any(name.startswith("row.") for name in tensors):
            return ()
        rows = tuple(tensors.pop(f"row.{i}", torch.empty(0)) for i in range(len(self._shapes)))
        for row, shape in zip(rows, self._shapes, strict=True):
            if row.shape != shape or row.dtype != torch.float32:
                raise SnapshotError(f"the snapshot's rows are not float32 {list(shape)}")
            if not numpy.isfinite(row.numpy()).all():  # torch's would wait for its threads
                raise SnapshotError("the snapshot's rows are not finite")
        return rows


def _checked(raw: bytes) -> bytes:
    """What follows the checksum."""
    if raw[: len(_MAGIC)] != _MAGIC:
        raise SnapshotError("these bytes are no snapshot of a session")
    if hashlib.sha256(raw[_START:]).digest() != raw[len(_MAGIC) : _START]:
        raise SnapshotError("the snapshot is damaged or cut: its checksum is another")
    return raw[_START:]


def _facts(body: bytes) -> dict[str, Any]:
    """The JSON beside the tensors, of a header whose length is bounded."""
    length = int.from_bytes(body[:8], "little")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, len(body) - 8):
        raise SnapshotError("the snapshot's header is longer than one may be, or than it is")
    try:
        facts = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["session"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SnapshotError(f"the snapshot's header cannot be read ({error!r:.200})") from None
    if not isinstance(facts, dict):
        raise SnapshotError("the snapshot's header is no object")
    return facts


def _list(tensors: dict[str, Tensor], name: str, kind: torch.dtype) -> list[int]:
    tensor = tensors.pop(name, None)
    if tensor is None or tensor.dtype != kind or tensor.dim() != 1:
        raise SnapshotError(f"the snapshot's {name} is no list of {kind}")
    values: list[int] = tensor.tolist()
    return values


def _check_together(state: SessionState) -> None:
    """What no session has: bytes of more than a character, an age of nothing that waits."""
    if len(state.undecoded) > 3:
        raise SnapshotError("the snapshot's undecoded bytes are more than part of a character")
    if state.position and not state.pending:
        raise SnapshotError("the snapshot's last id does not wait to be fed")
    if len(state.recent) > state.num_tokens:
        raise SnapshotError("the snapshot has more recent ids than ids")
