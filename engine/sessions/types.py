"""What is told of sessions, and what a turn holds. Knows nothing of where they are kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cottention.engine.sessions.store.protocol import Lease
from cottention.engine.state.context_window import ContextPolicy
from cottention.engine.state.session_state import SessionState

Residence = Literal["resident", "parked", "stored"]
"""A turn runs; the state is in memory; it is on the disk alone."""


@dataclass(frozen=True, slots=True)
class Session:
    """A session as it is after its last turn.

    position: tokens it holds. nbytes: of its stored state. created, expires_at: unix seconds.
    num_checkpoints: turns that can be taken back. is_durable: a restart loses nothing of it.
    was_interrupted: a crash cut its last turn, and it is as it was before. context_start: index of
    the oldest token that its next one is drawn with; nothing older is remembered.
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


class Exported(NamedTuple):
    """A session, and the snapshot of it at that very position."""

    session: Session
    raw: bytes


@dataclass(frozen=True, slots=True)
class Turn:
    """The right to change a session, and the value that the change starts from."""

    session: Session
    state: SessionState
    lease: Lease


@dataclass(frozen=True, slots=True)
class SessionCounts:
    """Sessions by residence; bytes of states in memory, and of snapshots on the disk.

    num_unsaved: those of the parked ones that a full disk did not take.
    """

    num_resident: int
    num_parked: int
    num_stored: int
    parked_bytes: int
    stored_bytes: int
    num_unsaved: int = 0
