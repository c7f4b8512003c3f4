"""The values that sessions are described by: what clients see, what a turn holds, counts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cottention.engine.sessions.store.journal import JournaledTurn
from cottention.engine.sessions.store.protocol import BlobReader, Claim, Lease, SessionRecord
from cottention.engine.state.context_window import ContextPolicy
from cottention.engine.state.event_log import NO_EVENTS, EventLog
from cottention.engine.state.session_state import SessionState

Residence = Literal["resident", "parked", "stored"]
"""A turn runs; the state is in memory; the state is on the disk alone."""


@dataclass(frozen=True, slots=True)
class Session:
    """A session as it is after its last turn.

    position: tokens it holds. nbytes: bytes it takes on the disk, without its checkpoints.
    created, expires_at: unix seconds. num_checkpoints: turns that can be rewound. is_durable:
    whether its last turn survives a restart. was_interrupted: a crash cut its last turn, and the
    session is as before it. context_start: index of the oldest token that the next one depends on.
    """

    id: str
    owner: str
    created: int
    version: int
    position: int
    nbytes: int
    residence: Residence
    metadata: Mapping[str, str]
    expires_at: float | None
    num_checkpoints: int
    is_durable: bool
    was_interrupted: bool
    context_policy: ContextPolicy
    context_start: int


class SessionValue(NamedTuple):
    """What a turn leaves of a session: its state, and the events of that turn."""

    state: SessionState
    events: EventLog = NO_EVENTS


class BytesReader(BlobReader):
    """Bytes in memory, to be read in pieces like a blob."""

    def __init__(self, raw: bytes) -> None:
        self.nbytes = len(raw)
        self._raw = raw

    def read(self, start: int, num_bytes: int) -> bytes:
        """At most `num_bytes` from `start` on."""
        return self._raw[start : start + num_bytes]

    def close(self) -> None:
        """Let the bytes go."""
        self._raw = b""


class OpenExport(NamedTuple):
    """A session, and its snapshot at that position, whose reader is to be closed."""

    session: Session
    snapshot: BlobReader


class Exported(NamedTuple):
    """A session, and its snapshot at that position."""

    session: Session
    raw: bytes


@dataclass(frozen=True, slots=True)
class Turn:
    """The right to change a session, and what the turn starts from."""

    session: Session
    state: SessionState
    lease: Lease
    record: SessionRecord


@dataclass(frozen=True, slots=True)
class AdoptedTurn:
    """A turn that another server has begun, what it needs to go on, and what it has done.

    ids: generated so far. events: the bytes of those that were told.
    """

    turn: Turn
    journaled: JournaledTurn
    ids: tuple[int, ...]
    events: bytes


@dataclass(frozen=True, slots=True)
class SessionAnswer:
    """The answer of a claimed request, made of the sessions as they are after it."""

    claim: Claim
    make: Callable[[Sequence[Session]], bytes]


@dataclass(frozen=True, slots=True)
class SessionCounts:
    """Numbers of sessions by residence; bytes of states in memory, and of blobs on the disk.

    num_unsaved: how many of the parked sessions could not be stored.
    """

    num_resident: int
    num_parked: int
    num_stored: int
    parked_bytes: int
    stored_bytes: int
    num_unsaved: int = 0
