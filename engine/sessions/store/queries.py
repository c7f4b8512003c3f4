"""The SQL of the index: sessions and their states as rows, and leases on sessions.

Each function runs inside a transaction of its caller. now: the store's time; monotonic: the clock
of leases (`StoreClock`). A session's states are numbered: the one with
the greatest n is its head, the others are its checkpoints.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable
from secrets import token_hex

from cottention.engine.errors import (
    NothingToRewindError,
    SessionBusyError,
    SessionMovedError,
    SessionNotFoundError,
    SnapshotError,
)
from cottention.engine.sessions.store.clock import ClockReading
from cottention.engine.sessions.store.protocol import (
    Lease,
    NewSession,
    Records,
    SessionRecord,
    Usage,
)

Db = sqlite3.Connection
State = tuple[str, int, int, str, int]
"""The columns of STATE_COLUMNS."""
SessionRow = tuple[int, str, str, int, int, str, float | None, int]
"""The columns of SESSION_COLUMNS."""

STATE_COLUMNS = "digest, position, nbytes, context_policy, events_nbytes"
SESSION_COLUMNS = (
    "seq, id, owner, created, version,"
    " (SELECT text FROM metadata WHERE key = metadata_key) AS metadata,"
    " expires_at, was_interrupted"
)

IS_ALIVE = "(expires_at IS NULL OR expires_at > :now)"
GOES_ON = (
    "EXISTS (SELECT 1 FROM turns AS j WHERE j.session = sessions.id AND j.fence = sessions.fence)"
)
"""A turn that goes on without its client, and at the next start without its process."""
IS_FREE = f"(lease_until IS NULL OR lease_until <= :monotonic) AND NOT {GOES_ON}"
IS_HELD = "id = :id AND fence = :fence AND lease_until IS NOT NULL"
NO_LEASE = "lease_owner = NULL, lease_until = NULL, lease_version = NULL"


def session_key(db: Db, session_id: str, now: float) -> int:
    """The `seq` of a session; SessionNotFoundError where it is unknown or expired."""
    statement = f"SELECT seq FROM sessions WHERE id = :id AND {IS_ALIVE}"
    row = db.execute(statement, {"id": session_id, "now": now}).fetchone()
    if row is None:
        raise SessionNotFoundError(f"no session {session_id!r}")
    return int(row[0])


def read_session(db: Db, seq: int) -> SessionRecord:
    """The record of a session that exists."""
    statement = f"SELECT {SESSION_COLUMNS} FROM sessions WHERE seq = ?"
    return to_record(db, db.execute(statement, [seq]).fetchone())


def to_record(db: Db, row: SessionRow) -> SessionRecord:
    """The record of a row of SESSION_COLUMNS, with the session's states."""
    seq, session_id, owner, created, version, metadata, expires_at, was_interrupted = row
    statement = f"SELECT {STATE_COLUMNS} FROM states WHERE seq = ? ORDER BY n"
    *checkpoints, head = db.execute(statement, [seq]).fetchall()
    digest, position, nbytes, context_policy, events_nbytes = head
    return SessionRecord(
        id=session_id,
        owner=owner,
        created=created,
        version=version,
        position=position,
        nbytes=nbytes,
        metadata=json.loads(metadata),
        expires_at=expires_at,
        head=digest,
        checkpoints=tuple(digest for digest, *_ in checkpoints),
        was_interrupted=bool(was_interrupted),
        context_policy=context_policy,
        events_nbytes=events_nbytes,
    )


def insert_session(db: Db, new: NewSession, state: State | None, created: int) -> SessionRecord:
    """A session of version 1 with a new state as its head, or with a blob that is stored.

    created: unix seconds, to be shown only.
    """
    key, nbytes = add_metadata(db, json.dumps(dict(new.metadata), ensure_ascii=False))
    cursor = db.execute(
        "INSERT INTO sessions (id, owner, created, metadata_key, metadata_nbytes, expires_at)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        [new.id or f"sess-{token_hex(16)}", new.owner, created, key, nbytes, new.expires_at],
    )
    states = [find_state(db, digest) for digest in new.checkpoints]
    states.append(state or find_state(db, new.head or ""))
    db.executemany(
        f"INSERT INTO states (seq, n, {STATE_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",
        [(cursor.lastrowid, n, *each) for n, each in enumerate(states)],
    )
    return read_session(db, cursor.lastrowid or 0)


def add_metadata(db: Db, text: str) -> tuple[int, int]:
    """The key of a text, which is stored if it is new, and its bytes."""
    raw = text.encode()
    digest = hashlib.sha256(raw).digest()
    db.execute("INSERT OR IGNORE INTO metadata (digest, text) VALUES (?, ?)", [digest, text])
    [key] = db.execute("SELECT key FROM metadata WHERE digest = ?", [digest]).fetchone()
    return key, len(raw)


def usage_of(db: Db, owner: str) -> Usage:
    """What an owner's sessions take."""
    statement = "SELECT num_sessions, nbytes FROM usage WHERE owner = ?"
    row: Usage | None = db.execute(statement, [owner]).fetchone()
    return row or (0, 0)


def find_state(db: Db, digest: str) -> State:
    """A state that some session has; SnapshotError where none has it."""
    statement = f"SELECT {STATE_COLUMNS} FROM states WHERE digest = ? LIMIT 1"
    row: State | None = db.execute(statement, [digest]).fetchone()
    if row is None:
        raise SnapshotError(f"no snapshot {digest!r} is stored")
    return row


def push_state(db: Db, seq: int, state: State, max_checkpoints: int) -> list[str]:
    """Add a new head; returns the digests of the checkpoints that were dropped for it."""
    [n] = db.execute(
        f"INSERT INTO states (seq, n, {STATE_COLUMNS}) VALUES"
        " (?1, (SELECT max(n) + 1 FROM states WHERE seq = ?1), ?2, ?3, ?4, ?5, ?6) RETURNING n",
        (seq, *state),
    ).fetchone()
    return delete_states(db, seq, 0, n - max_checkpoints)


def pop_state(db: Db, seq: int) -> list[str]:
    """Make the newest checkpoint the head; returns the old head's digest.

    NothingToRewindError: there is no checkpoint.
    """
    numbers = [n for (n,) in db.execute("SELECT n FROM states WHERE seq = ? ORDER BY n", [seq])]
    if len(numbers) < 2:
        raise NothingToRewindError("no earlier turn of this session is stored")
    return delete_states(db, seq, numbers[-1], numbers[-1] + 1)


def delete_states(db: Db, seq: int, start: int, stop: int) -> list[str]:
    """Delete a session's states start <= n < stop; returns their digests."""
    statement = "DELETE FROM states WHERE seq = ? AND n >= ? AND n < ? RETURNING digest"
    return [digest for (digest,) in db.execute(statement, [seq, start, stop]).fetchall()]


def delete_session(db: Db, seq: int) -> list[str]:
    """Delete a session and its states; returns the digests of these."""
    rows = db.execute("DELETE FROM states WHERE seq = ? RETURNING digest", [seq]).fetchall()
    db.execute("DELETE FROM sessions WHERE seq = ?", [seq])
    return [digest for (digest,) in rows]


def unreferenced(db: Db, digests: Iterable[str]) -> set[str]:
    """Those of the digests that no session has."""
    statement = "SELECT 1 FROM states WHERE digest = ? LIMIT 1"
    return {digest for digest in digests if db.execute(statement, [digest]).fetchone() is None}


def find_expired(db: Db, now: float, monotonic: float, limit: int) -> list[tuple[int, str]]:
    """`seq` and id of sessions that have expired and are not leased."""
    statement = f"SELECT seq, id FROM sessions WHERE expires_at <= :now AND {IS_FREE} LIMIT :limit"
    values = {"now": now, "monotonic": monotonic, "limit": limit}
    return db.execute(statement, values).fetchall()


def list_sessions(
    db: Db, owner: str, after: str | None, limit: int, now: float
) -> tuple[Records, bool]:
    """An owner's sessions, newest first, after `after`; whether there are more."""
    values = {"owner": owner, "now": now, "limit": limit + 1, "seq": 0}
    behind = ""
    if after is not None:
        place = "SELECT seq FROM sessions WHERE id = ? AND owner = ?"
        row = db.execute(place, [after, owner]).fetchone()
        if row is None:
            raise SessionNotFoundError(f"no session {after!r}")
        [values["seq"]] = row
        behind = "AND seq < :seq"
    statement = (
        f"SELECT {SESSION_COLUMNS} FROM sessions WHERE owner = :owner AND {IS_ALIVE} {behind}"
        " ORDER BY seq DESC LIMIT :limit"
    )
    rows = db.execute(statement, values).fetchall()
    return [to_record(db, row) for row in rows[:limit]], len(rows) > limit


def require_free(db: Db, seq: int, monotonic: float) -> None:
    """SessionBusyError where the session is leased."""
    statement = f"SELECT 1 FROM sessions WHERE seq = :seq AND {IS_FREE}"
    if db.execute(statement, {"seq": seq, "monotonic": monotonic}).fetchone() is None:
        raise SessionBusyError("a turn has the session: try again when it has ended, or cancel it")


def acquire_lease(
    db: Db,
    session_id: str,
    owner: str | None,
    holder: str,
    seconds: float,
    now: float,
    monotonic: float,
) -> tuple[Lease, SessionRecord]:
    """Lease a session to `holder` under the next fence, and read it.

    owner: SessionNotFoundError where the session is another owner's; None: whoever owns it.
    SessionBusyError: it is leased, and the lease has not run out.
    """
    values = {
        "id": session_id,
        "owner": owner,
        "holder": holder,
        "until": monotonic + seconds,
        "now": now,
        "monotonic": monotonic,
    }
    belongs = f"id = :id AND (:owner IS NULL OR owner = :owner) AND {IS_ALIVE}"
    row = db.execute(
        "UPDATE sessions SET fence = fence + 1, lease_owner = :holder, lease_until = :until,"
        f" lease_version = version WHERE {belongs} AND {IS_FREE}"
        f" RETURNING fence, {SESSION_COLUMNS}",
        values,
    ).fetchone()
    if row is not None:
        fence, *session = row
        record = to_record(db, (*session,))
        return Lease(session_id, fence, record.version), record
    if db.execute(f"SELECT 1 FROM sessions WHERE {belongs}", values).fetchone() is None:
        raise SessionNotFoundError(f"no session {session_id!r}")
    raise SessionBusyError(f"another turn has session {session_id!r}")


def renew_lease(db: Db, lease: Lease, until: float) -> None:
    """SessionMovedError where it is no longer held."""
    cursor = db.execute(
        f"UPDATE sessions SET lease_until = :until WHERE {IS_HELD}",
        {"id": lease.session_id, "fence": lease.fence, "until": until},
    )
    if cursor.rowcount == 0:
        raise SessionMovedError(f"session {lease.session_id!r} is no longer held by this turn")


def release_lease(db: Db, lease: Lease) -> None:
    """Nothing happens where it is no longer held."""
    db.execute(
        f"UPDATE sessions SET {NO_LEASE} WHERE {IS_HELD}",
        {"id": lease.session_id, "fence": lease.fence},
    )


def read_clock(db: Db) -> ClockReading | None:
    """The last reading; None in a new index."""
    row = db.execute("SELECT time, wall FROM clock").fetchone()
    return row and ClockReading(*row)


def write_clock(db: Db, reading: ClockReading) -> None:
    """Replace the last reading."""
    db.execute("DELETE FROM clock")
    db.execute("INSERT INTO clock VALUES (?, ?)", reading)


REWIND = "version = version + 1"
COMMIT = f"{REWIND}, was_interrupted = 0"
COMMIT_AND_RELEASE = f"{COMMIT}, {NO_LEASE}"
"""What a compare-and-set assigns."""


def compare_and_set(db: Db, lease: Lease, expected_version: int, assignments: str) -> SessionRow:
    """Change a session under its current lease and at this version; the row after it.

    SessionMovedError: the lease is no longer held, or the version is another.
    """
    row: SessionRow | None = db.execute(
        f"UPDATE sessions SET {assignments} WHERE {IS_HELD} AND version = :version"
        f" RETURNING {SESSION_COLUMNS}",
        {"id": lease.session_id, "fence": lease.fence, "version": expected_version},
    ).fetchone()
    if row is None:
        raise SessionMovedError(
            f"session {lease.session_id!r} is not at version {expected_version}, or was taken over"
        )
    return row
