"""States and their blobs, as rows: a blob is written once, and counts the states that have it.

Each function runs inside a transaction of its caller.
"""

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import psycopg

from cottention.engine.errors import SnapshotError

Db = psycopg.Connection[Any]


MAX_DEFLATED = 1 << 16
"""Bytes of the largest blob that is deflated: ids become less than half, states hardly less."""


class State(NamedTuple):
    """What a session has of a state; in the database, as a list with the digest in hex."""

    digest: bytes
    position: int
    nbytes: int
    context_policy: str
    events_nbytes: int

    def listed(self) -> list[Any]:
        """As it is in the database."""
        return [self.digest.hex(), *self[1:]]

    @classmethod
    def of_list(cls, found: Sequence[Any]) -> "State":
        """What `listed` made."""
        digest, *others = found
        return cls(bytes.fromhex(digest), *others)


@dataclass(frozen=True, slots=True)
class Blob:
    """A state to be written: `raw` is a snapshot and, in its last bytes, the event log."""

    digest: bytes
    raw: bytes
    position: int
    context_policy: str
    events_nbytes: int

    @classmethod
    def of(cls, snapshot: bytes, events: bytes, position: int, context_policy: str) -> "Blob":
        raw = snapshot + events
        return cls(sha256(raw).digest(), raw, position, context_policy, len(events))

    @property
    def state(self) -> State:
        """The state that has this blob."""
        return State(
            self.digest, self.position, len(self.raw), self.context_policy, self.events_nbytes
        )

    def deflated(self) -> bytes:
        """As it is in the database: deflated where that is shorter."""
        if len(self.raw) > MAX_DEFLATED:
            return self.raw
        return min(self.raw, zlib.compress(self.raw, 1), key=len)  # equal lengths mean raw bytes


def inflated(stored: bytes, nbytes: int) -> bytes:
    """A blob of `nbytes` from what `Blob.deflated` made; damaged bytes do not become right ones."""
    if len(stored) == nbytes:
        return stored
    try:
        return zlib.decompressobj().decompress(stored, nbytes)
    except zlib.error:
        return b""


def change_blobs(
    db: Db, added: Iterable[Blob], dropped: Iterable[bytes], named: Iterable[bytes] = ()
) -> None:
    """Count states that have come and gone; a blob without a state goes as well.

    named: digests of new states whose blobs are stored; SnapshotError where one is not. In the
    order of digests, so that no two transactions wait for each other.
    """
    new: dict[bytes, Blob] = {}
    changes: Counter[bytes] = Counter()
    for blob in added:
        new[blob.digest] = blob
        changes[blob.digest] += 1
    changes.update(named)
    changes.subtract(dropped)
    for digest, change in sorted(changes.items()):
        if change > 0 and digest in new:
            db.execute(ADD_BLOB, [*new[digest].state, change, new[digest].deflated()])
        elif change > 0:
            if db.execute(SHARE_BLOB, [change, digest]).rowcount == 0:
                raise SnapshotError(f"no snapshot {digest.hex()!r} is stored")
        elif change < 0:
            db.execute(DROP_BLOB, {"digest": digest, "change": change})


ADD_BLOB = (
    "INSERT INTO cottention.blobs AS b"
    " (digest, position, nbytes, context_policy, events_nbytes, refs, bytes)"
    " VALUES (%s, %s, %s, %s, %s, %s, %s)"
    " ON CONFLICT (digest) DO UPDATE SET refs = b.refs + excluded.refs"
)
SHARE_BLOB = "UPDATE cottention.blobs SET refs = refs + %s WHERE digest = %s"
DROP_BLOB = (
    "WITH found AS ("
    "  SELECT refs FROM cottention.blobs WHERE digest = %(digest)s FOR UPDATE),"
    " gone AS ("
    "  DELETE FROM cottention.blobs WHERE digest = %(digest)s"
    "  AND (SELECT refs FROM found) + %(change)s <= 0 RETURNING 1)"
    " UPDATE cottention.blobs SET refs = refs + %(change)s WHERE digest = %(digest)s"
    " AND (SELECT refs FROM found) + %(change)s > 0"
)


def find_state(db: Db, digest: bytes) -> State:
    """The state of a blob that is stored; SnapshotError where it is not."""
    row = db.execute(
        "SELECT digest, position, nbytes, context_policy, events_nbytes FROM cottention.blobs"
        " WHERE digest = %s",
        [digest],
    ).fetchone()
    if row is None:
        raise SnapshotError(f"no snapshot {digest.hex()!r} is stored")
    return State(*row)


def as_digest(name: str) -> bytes:
    """SnapshotError for what is no sha256 in lower hex."""
    if len(name) != 64 or name.strip("0123456789abcdef"):
        raise SnapshotError("not a digest of a snapshot")
    return bytes.fromhex(name)
