"""What may be told of a session, and the right to change one. Knows no tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from engine.session_state import SessionState
from engine.snapshot import CONTEXT_POLICY
from engine.store import Lease, Record

Residence = Literal["resident", "parked", "stored"]


@dataclass(frozen=True, slots=True)
class Session:
    """What may be told of a session.

    position: tokens it holds. nbytes: of its value as stored. context_start: the oldest token that
    its state still has. was_interrupted: a crash cut its last turn; it is as before that turn.
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
    context_policy: str = CONTEXT_POLICY
    context_start: int = 0

    @classmethod
    def of(cls, record: Record, position: int, residence: Residence, is_durable: bool) -> Self:
        """A store's record, and what the store does not know of it."""
        return cls(
            id=record.id,
            owner=record.owner,
            created=record.created,
            version=record.version,
            position=position,
            nbytes=record.nbytes,
            residence=residence,
            metadata=record.metadata,
            expires_at=record.expires_at,
            num_checkpoints=len(record.checkpoints),
            is_durable=is_durable,
            was_interrupted=record.was_interrupted,
        )


@dataclass(frozen=True, slots=True)
class Turn:
    """The right to put another value in the place of `state`."""

    session: Session
    state: SessionState
    lease: Lease


@dataclass(frozen=True, slots=True)
class SessionCounts:
    """num_parked counts values in memory, num_stored all sessions of the store."""

    num_resident: int
    num_parked: int
    num_stored: int
    parked_bytes: int
    stored_bytes: int
