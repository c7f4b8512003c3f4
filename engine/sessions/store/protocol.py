"""What a store of sessions promises, whoever keeps it.

Owns the words: records, leases, fences, versions. Does not know files, databases, tensors or what
a snapshot's bytes mean. Another machine may share such a store: correctness rests on its fences
and versions, never on which process a request reached.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class NewSession:
    """A session to be made, of bytes (`snapshot`) or of a blob that is there (`head`).

    position: tokens it holds. checkpoints: digests of blobs that are there, oldest first.
    expires_at: unix seconds. context_policy: told with it, and not understood here.
    """

    owner: str
    position: int
    snapshot: bytes | None = None
    head: str | None = None
    checkpoints: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    expires_at: float | None = None
    context_policy: str = "exact"


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session as the store has it.

    created: unix seconds. version: 1 when new, one more with every change of its head.
    position, context_policy: of the head. nbytes: of its blob. head, checkpoints: sha256 in hex,
    the oldest checkpoint first. was_interrupted: a crash cut its last turn and it is as before.
    """

    id: str
    owner: str
    created: int
    version: int
    position: int
    nbytes: int
    metadata: Mapping[str, str]
    expires_at: float | None
    head: str
    checkpoints: tuple[str, ...]
    was_interrupted: bool
    context_policy: str = "exact"


Records = list[SessionRecord]
Ids = list[str]
"""A store has a method `list`, which hides the type of that name."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to change a session. fence: grows with every lease. version: when it was given."""

    session_id: str
    fence: int
    version: int


@dataclass(frozen=True, slots=True)
class StoreCounts:
    """How much is kept. blob_bytes: of all snapshots on the disk, shared ones once."""

    num_sessions: int
    blob_bytes: int


class SessionStore(Protocol):
    """Sessions and their snapshots. What returned is kept; what raised changed nothing.

    All methods may be called from any thread, and raise SessionNotFoundError for an id that is
    unknown or expired and StoreFullError where the disk takes no more.
    """

    def create(self, records: Sequence[NewSession]) -> Records:
        """Make all of them or none. SnapshotError: a named blob is not there."""
        ...

    def acquire(self, session_id: str, ttl_seconds: float) -> Lease:
        """The only right to change it until release or the end of its time. SessionBusyError."""
        ...

    def renew(self, lease: Lease, ttl_seconds: float) -> None:
        """Begin its time again. SessionMovedError: somebody else has it, or it was released."""
        ...

    def release(self, lease: Lease) -> None:
        """Give it back; nothing happens where it is no longer held."""
        ...

    def head(self, session_id: str) -> int:
        """Its version."""
        ...

    def record(self, session_id: str) -> SessionRecord:
        """All about it but its bytes."""
        ...

    def get(self, digest: str) -> bytes:
        """A blob. SnapshotError: it is missing, or not what was stored."""
        ...

    def put(
        self,
        lease: Lease,
        expected_version: int,
        snapshot: bytes,
        position: int,
        max_checkpoints: int,
        context_policy: str = "exact",
    ) -> SessionRecord:
        """A new head; the old one becomes the newest of at most `max_checkpoints` checkpoints.

        SessionMovedError: the lease is not the last one given, or the version another.
        """
        ...

    def rewind(self, lease: Lease, expected_version: int) -> SessionRecord:
        """The newest checkpoint becomes the head. NothingToRewindError; SessionMovedError."""
        ...

    def delete(self, session_id: str) -> None:
        """Forget it, and the blobs that no other session needs. SessionBusyError."""
        ...

    def list(self, owner: str, after: str | None, limit: int) -> tuple[Records, bool]:
        """A page of an owner's sessions, newest first, behind `after`; whether there are more."""
        ...

    def counts(self) -> StoreCounts:
        """How much is kept."""
        ...

    def expire(self, now: float, limit: int) -> Ids:
        """Delete at most `limit` that are past their time (unix seconds) and not leased; which."""
        ...

    def free_room(self) -> None:
        """Let snapshots have what was kept back for leases on a full disk, before a close."""
        ...

    def close(self) -> None:
        """Let go of everything; leases end."""
        ...
