"""The journal of turns that go on without their client, of stores that several servers share.

When the server of such a turn dies, another one adopts it: it takes the lease over, reads what the
turn has generated and told, and goes on.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cottention.engine.sessions.store.protocol import Lease, SessionRecord

MAX_TRIES = 5
"""Servers that adopt a turn and die before it has gone on; then it is undone."""


@dataclass(frozen=True, slots=True)
class JournaledTurn:
    """What another server needs to go on with a turn.

    turn: the first part of its events' ids. name: the id of its response. path, body: the request.
    seed: of its sampling. created: unix seconds of its response. deadline: by the store's time.
    key, token: of its idempotency key.
    """

    owner: str
    turn: str
    name: str
    path: str
    body: bytes
    seed: int
    created: int
    deadline: float | None = None
    key: str | None = None
    token: str | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of what a turn has generated and told: ids, and the bytes of its events."""

    lease: Lease
    n: int
    ids: Sequence[int]
    events: bytes


@dataclass(frozen=True, slots=True)
class Adopted:
    """A turn that this server goes on with: its new lease, its session, and what it has done."""

    lease: Lease
    record: SessionRecord
    turn: JournaledTurn
    ids: tuple[int, ...]
    events: bytes


@dataclass(frozen=True, slots=True)
class Holder:
    """Who runs a session's turn. url: None where it tells none. goes_on: the turn is journaled."""

    url: str | None
    is_mine: bool
    is_alive: bool
    goes_on: bool


class SessionJournal(Protocol):
    """The journal of a store. All methods may be called from any thread.

    They raise StoreUnavailableError.
    """

    @property
    def life(self) -> int | None:
        """The number of this server's life; None while it may count as dead.

        A server that has missed heartbeats begins another life: its turns may have been adopted.
        """
        ...

    @property
    def is_steady(self) -> bool:
        """Whether this server has lived for as long as the others may take to be seen again."""
        ...

    def begin(self, lease: Lease, turn: JournaledTurn) -> None:
        """Journal a turn from now on. SessionMovedError: its lease is not held."""
        ...

    def has(self, lease: Lease) -> bool:
        """Whether a turn of this server is journaled and has not ended."""
        ...

    def append(self, chunks: Iterable[Chunk]) -> set[Lease]:
        """Store parts of several turns; the leases of those that were still held."""
        ...

    def holds(self, lease: Lease) -> bool:
        """Whether the lease is still held."""
        ...

    def waiting(self) -> Sequence[str]:
        """Sessions, some of them, whose turns no living server goes on with."""
        ...

    def adopt(self, session_id: str, ttl_seconds: float) -> Adopted | None:
        """Take a turn over; None where it is not `waiting`."""
        ...

    def hand_over(self, lease: Lease, *, has_failed: bool = False) -> None:
        """Give a turn to whoever adopts it.

        has_failed: it cannot go on here; counted as if this server had died of it.
        """
        ...

    def drain(self) -> None:
        """Tell the others that this server takes nothing new."""
        ...

    def holder(self, session_id: str, owner: str) -> Holder | None:
        """Who runs the session's turn; None where none runs. SessionNotFoundError."""
        ...

    def urls(self) -> Sequence[str]:
        """Of the other servers that live."""
        ...

    def lives(self, url: str) -> bool:
        """Whether there is a server at this address that lives."""
        ...
