"""States and their blobs, as rows: a blob is written once, and counts the states that have it.

Each function runs inside a transaction of its caller.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import psycopg

from cottention.engine.errors import SnapshotError

Db = psycopg.Connection[Any]


class State(NamedTuple):
    """The columns of a state besides its session, its n and the turn that wrote it."""

    digest: bytes
    position: int
    nbytes: int
    context_policy: str
    events_nbytes: int


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


def change_blobs(
    db: Db, added: Iterable[Blob], dropped: Iterable[bytes], named: Iterable[bytes] = ()
) -> None:
    """Count states that have come and gone; a blob without a state goes as well.

    named: digests of new states whose blobs are stored; SnapshotError where one is not. In the
    order of digests, so that no two transactions wait for each other.
    """
    raws: dict[bytes, bytes] = {}
    changes: Counter[bytes] = Counter()
    for blob in added:
        raws[blob.digest] = blob.raw
        changes[blob.digest] += 1
    changes.update(named)
    changes.subtract(dropped)
    for digest, change in sorted(changes.items()):
        if change > 0 and digest in raws:
            db.execute(ADD_BLOB, [digest, change, len(raws[digest]), raws[digest]])
        elif change > 0:
            if db.execute(SHARE_BLOB, [change, digest]).rowcount == 0:
                raise SnapshotError(f"no snapshot {digest.hex()!r} is stored")
        elif change < 0:
            db.execute(DROP_BLOB, {"digest": digest, "change": change})


ADD_BLOB = (
    "INSERT INTO cottention.blobs AS b (digest, refs, nbytes, bytes) VALUES (%s, %s, %s, %s)"
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
    """A state that some session has; SnapshotError where none has it."""
    row = db.execute(
        "SELECT digest, position, nbytes, context_policy, events_nbytes FROM cottention.states"
        " WHERE digest = %s LIMIT 1",
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
