"""What a store of sessions guarantees: records, blobs, leases with fences, versions.

Several machines may share such a store: correctness rests on its fences and versions, never on
which process a request reached.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cottention.engine.errors import SessionQuotaError


@dataclass(frozen=True, slots=True)
class NewSession:
    """A session to be created, from bytes (`snapshot`) or from a blob that is stored (`head`).

    position: tokens it holds. checkpoints: digests of stored blobs, oldest first. events: the
    event log that goes with `snapshot`. expires_at: by the store's time. context_policy: of the
    snapshot; a store keeps it and does not interpret it. id: None: the store chooses one.
    """

    owner: str
    position: int
    snapshot: bytes | None = None
    head: str | None = None
    checkpoints: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    expires_at: float | None = None
    context_policy: str = "exact"
    events: bytes = b""
    id: str | None = None


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session as it is stored.

    created: unix seconds. expires_at: by the store's time. version: 1 when new, one more with every
    change of its head. position, context_policy: of the head. nbytes: of its blob. head,
    checkpoints: digests of blobs (sha256 in hex), the oldest checkpoint first. was_interrupted: a
    crash cut its last turn, and the session is as before it. events_nbytes: how many of the head's
    last bytes are the event log.
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
    events_nbytes: int = 0

    @property
    def snapshot_nbytes(self) -> int:
        """Bytes of the head's snapshot, after which its event log comes."""
        return self.nbytes - self.events_nbytes

    def split(self, blob: bytes) -> tuple[bytes, bytes]:
        """The head's blob as its snapshot and its event log."""
        end = len(blob) - self.events_nbytes
        return blob[:end], blob[end:]


Records = list[SessionRecord]
Ids = list[str]
"""Aliases, because a store's method `list` hides the type of that name."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to change a session.

    fence: grows with every lease of the session. version: the session's when it was leased.
    """

    session_id: str
    fence: int
    version: int


@dataclass(frozen=True, slots=True)
class Quota:
    """What one owner's sessions may take; None is unlimited.

    max_bytes: of states, those that can be rewound to included, and of metadata. Each session
    counts in full, whatever it shares with others: forks part with their next turns.
    """

    max_sessions: int | None = None
    max_bytes: int | None = None

    def check(self, before: "Usage", after: "Usage") -> None:
        """SessionQuotaError where an owner has come to more than its quota."""
        limits = (self.max_sessions, "sessions"), (self.max_bytes, "bytes of sessions")
        for (limit, what), old, new in zip(limits, before, after, strict=True):
            if limit is not None and new > limit and new > old:
                raise SessionQuotaError(
                    f"this would make {new} {what}, and {limit} are allowed: delete sessions, or"
                    " give them a shorter ttl_seconds"
                )


Usage = tuple[int, int]
"""Number of an owner's sessions, and their bytes."""

UNLIMITED = Quota()
Quotas = Callable[[str], Quota]
"""The quota of an owner."""


@dataclass(frozen=True, slots=True)
class StoreCounts:
    """How much is stored. blob_bytes: of all blobs, shared ones counted once."""

    num_sessions: int
    blob_bytes: int


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to answer the request of an owner's idempotency key. token: of this claim alone."""

    owner: str
    key: str
    token: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """Another claim of the same key and request.

    answer: what was answered; None while the answer is being made. url: of the server that makes
    it; None where that is this one, or tells none. is_alive: whether that server lives.
    """

    answer: bytes | None = None
    url: str | None = None
    is_mine: bool = True
    is_alive: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a claimed request, made of the sessions as they are stored with it.

    What it returns is stored in the transaction that stores them.
    """

    claim: Claim
    make: Callable[[Sequence[SessionRecord]], bytes]


MAX_KEYS = 10_000
"""Idempotency keys of one owner that are remembered; the oldest are forgotten first."""


class BlobReader(Protocol):
    """A blob's bytes, or a part of them, to be read in pieces; they stay as they are meanwhile."""

    nbytes: int

    def read(self, start: int, num_bytes: int) -> bytes:
        """At most `num_bytes` from `start` on. StoreUnavailableError."""
        ...

    def close(self) -> None:
        """End the reading. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Loan:
    """Tokens that a server may let an owner use; seconds until there is one to lend again."""

    lent: float
    seconds: float


class KeyLedger(Protocol):
    """What owners use at all servers of a shared store together. StoreUnavailableError.

    replica: the name of this server. is_alive: the others surely see that it lives.
    """

    replica: str

    @property
    def is_alive(self) -> bool: ...

    def borrow(self, owner: str, owed: float, portion: float, per_minute: int) -> Loan:
        """Pay what was used beyond earlier loans, and take up to `portion` tokens.

        The bucket refills to `per_minute` in a minute; what is owed may leave it below zero. A
        negative `owed` gives tokens back.
        """
        ...

    def exchange(self, running: Mapping[str, int]) -> Mapping[str, int]:
        """Tell how many requests of each owner run here, and learn how many run elsewhere."""
        ...


class SessionStore(Protocol):
    """Sessions and their blobs. A blob is a snapshot and, after it, the turn's event log.

    Snapshots say where they end: blobs of equal bytes have equal snapshots and event logs.

    What a method returned is stored; a method that raised changed nothing. All methods may be
    called from any thread. They raise SessionNotFoundError for an id that is unknown or expired,
    and StoreUnavailableError where the system refuses a write or a read, whatever the reason
    (StoreFullError: the disk has no room). `create` and `commit` raise SessionQuotaError where the
    owner would have more than its quota afterwards, and more than before.

    Lifetimes count in the store's time, which passes evenly although clocks are set.

    is_shared: other servers use it as well. What such a store does not take may not be kept in
    memory for later: another server would go on from what the store has. key_ledger: of those
    servers; None where there are no others.
    """

    is_shared: bool
    key_ledger: KeyLedger | None

    def create(self, records: Sequence[NewSession], answer: Answer | None = None) -> Records:
        """Create all of them or none. SnapshotError: a named blob is not stored.

        answer: as in `commit`.
        """
        ...

    def acquire(
        self, session_id: str, ttl_seconds: float, owner: str | None = None
    ) -> tuple[Lease, SessionRecord]:
        """Lease a session until release or `ttl_seconds`, and read it, in one transaction.

        owner: SessionNotFoundError where the session is another owner's; None: whoever owns it.
        SessionBusyError: it is leased; where who has it may be dead, it says that it is late.
        """
        ...

    def renew(self, lease: Lease, ttl_seconds: float) -> None:
        """Extend a lease. SessionMovedError: it was released or taken over."""
        ...

    def release(self, lease: Lease) -> None:
        """End a lease; nothing happens where it is no longer held."""
        ...

    def head(self, session_id: str) -> int:
        """The session's version."""
        ...

    def record(self, session_id: str) -> SessionRecord:
        """Everything about a session except its bytes."""
        ...

    def get(self, digest: str) -> bytes:
        """A blob. SnapshotError: it is missing, or its bytes are not those that were stored."""
        ...

    def open_blob(self, digest: str, start: int, stop: int) -> BlobReader:
        """The bytes start <= n < stop of a blob, all of which has been checked as in `get`.

        Never has more than a piece of it in memory. SnapshotError, as in `get`.
        """
        ...

    def commit(
        self,
        lease: Lease,
        expected_version: int,
        snapshot: bytes,
        position: int,
        max_checkpoints: int,
        context_policy: str = "exact",
        events: bytes = b"",
        *,
        keeps_lease: bool = False,
        answer: Answer | None = None,
    ) -> SessionRecord:
        """Store a new head and release the lease, in one transaction.

        answer: of the turn's idempotency key, stored in the same transaction. SessionMovedError
        where its claim is no longer held.

        The old head becomes the newest of at most `max_checkpoints`. keeps_lease: the turn goes
        on. SessionMovedError: the lease is not the last one given, or the version is another.
        """
        ...

    def rewind(self, lease: Lease, expected_version: int) -> SessionRecord:
        """Make the newest checkpoint the head. NothingToRewindError; SessionMovedError."""
        ...

    def delete(self, session_id: str) -> None:
        """Delete a session, and the blobs that no other session needs. SessionBusyError."""
        ...

    def list(self, owner: str, after: str | None, limit: int) -> tuple[Records, bool]:
        """A page of an owner's sessions, newest first, after `after`; whether there are more."""
        ...

    def claim(self, owner: str, key: str, request: bytes, seconds: float) -> Claim | Claimed:
        """Claim the request of an idempotency key, which is remembered for so long.

        request: its digest. KeyReusedError: the key was sent with another request.
        """
        ...

    def keep_answer(self, claim: Claim, answer: bytes) -> None:
        """Store the answer of a claimed request; nothing happens where it is no longer claimed."""
        ...

    def drop_claim(self, claim: Claim) -> None:
        """Let the request be sent again: nothing came of it. Answers that are stored stay."""
        ...

    def counts(self) -> StoreCounts:
        """How much is stored."""
        ...

    def check_reachable(self) -> None:
        """Does nothing, without waiting, or raises StoreUnreachableError: requests would, too."""
        ...

    def now(self) -> float:
        """The store's time, in seconds."""
        ...

    def unix_time(self, moment: float) -> float:
        """A moment of the store's time in unix seconds, by the system's clock as it is now."""
        ...

    def expire(self, limit: int) -> Ids:
        """Delete at most `limit` sessions that have expired for certain and are not leased.

        Returns their ids.
        """
        ...

    def give_back(self) -> bool:
        """Give space that is free again back to the disk, a part of it; whether there is more."""
        ...

    def free_reserve(self) -> None:
        """Let blobs use the space that is reserved for leases on a full disk, before a close."""
        ...

    def close(self) -> None:
        """Close the store; all leases end."""
        ...
