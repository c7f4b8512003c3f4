"""A session as one self-contained binary, and back.

Owns the format: a magic word, the sha256 of all that follows, a safetensors file. Does not know
where snapshots are kept or sent.

There is one spelling of every state. A reader takes no more from a header than the few numbers on
which the spelling depends, spells the header that they make, and wants those very bytes: whatever
else a header may claim, twice or nested or out of place, is refused without being understood.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import NamedTuple

from cottention.engine import sealed
from cottention.engine.errors import SnapshotError, SnapshotMismatchError
from cottention.engine.fingerprints import Fingerprints
from cottention.engine.outbox import Outbox
from cottention.engine.renewal import ContextPolicy, Grid
from cottention.engine.session_state import SessionState
from cottention.engine.state_spec import StateSpec

FORMAT_VERSION = 2
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
        fingerprints: Fingerprints,
        spec: StateSpec,
        num_ids: int,
        grids: Mapping[ContextPolicy, Grid],
        window: int,
    ) -> None:
        self.grids = grids
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
            "event_sizes": [len(event) for event in state.outbox.events],
            "undecoded": state.undecoded,
            "events": b"".join(state.outbox.events),
        }
        lengths = {name: len(values) for name, values in lists.items()}
        name = self.grids[state.context_policy].name
        turn, first = state.outbox.turn, state.outbox.first
        sizes = _Sizes(state.position, name, turn, first, bool(state.rows), lengths)
        return sealed.seal(
            [
                self._header(sizes),
                *(sealed.floats_to_bytes(row) for row in state.rows),
                *(sealed.ints_to_bytes(_LISTS[name], values) for name, values in lists.items()),
            ]
        )

    def decode(self, raw: bytes) -> SessionState:
        """The state of a snapshot; sizes are held against `raw` before they are used.

        SnapshotMismatchError: it is whole and of another model or format. SnapshotError: it is not.
        """
        header, data = sealed.unseal(raw)
        sizes = self._sizes(header)
        entries = self._entries(sizes)
        if header != self._header(sizes):
            raise SnapshotError("the snapshot's header is not one that this server writes")
        if len(data) != entries["events"].end:
            raise SnapshotError("the snapshot's sizes are not those of its header")
        lists = {name: sealed.ints_at(data, entries[name]) for name in _LISTS}
        self._check(sizes, lists)
        events = lists["event_sizes"], bytes(lists["events"])
        outbox = Outbox.unpacked(sizes.turn, sizes.first_event, *events)
        return SessionState(
            rows=tuple(
                sealed.floats_at(data, entries[name]) for name in entries if name not in _LISTS
            ),
            position=sizes.position,
            pending=tuple(lists["pending"]),
            recent=tuple(lists["recent"]),
            counts=dict(zip(lists["count_ids"], lists["counts"], strict=True)),
            undecoded=bytes(lists["undecoded"]),
            outbox=outbox,
            context_policy=self._policies[sizes.context_policy],
        )

    def _entries(self, sizes: _Sizes) -> dict[str, sealed.Entry]:
        """Every tensor of the file, in the order of its bytes."""
        shapes = self._row_shapes if sizes.has_rows else []
        tensors: list[tuple[str, str, tuple[int, ...]]] = [
            *((f"row.{i}", "F32", shape) for i, shape in enumerate(shapes)),
            *((name, dtype, (sizes.lengths[name],)) for name, dtype in _LISTS.items()),
        ]
        return sealed.placed(tensors)

    def _header(self, sizes: _Sizes) -> bytes:
        """The one spelling of a header for these sizes."""
        metadata = {name: str(getattr(sizes, name)) for name in _NUMBERS}
        metadata = self._expected | metadata
        return sealed.header_text(metadata, self._entries(sizes))

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
            position, first_event = int(metadata["position"]), int(metadata["first_event"])
            has_rows, turn = "row.0" in found, metadata["turn"]
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
