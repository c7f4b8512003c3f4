"""Sessions as rows: the statements that read and change them.

Owns the SQL of sessions and of which state is whose. Does not know transactions, locks or files.

The right to change a session: leases, their fences, and the compare-and-set under them.

Owns the SQL of who may write. Does not know transactions, files or what is written.
"""

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
from cottention.engine.sessions.store.protocol import Lease, NewSession, Records, SessionRecord

Db = sqlite3.Connection
State = tuple[str, int, int, str]  # digest, position, nbytes, context_policy
STATE = "digest, position, nbytes, context_policy"

COLUMNS = "seq, id, owner, created, version, metadata, expires_at, was_interrupted"
IS_ALIVE = "(expires_at IS NULL OR expires_at > :now)"
IS_FREE = "(lease_until IS NULL OR lease_until <= :now)"


def seq_of(db: Db, session_id: str, now: float) -> int:
    """Its row's key; SessionNotFoundError where it is unknown or expired."""
    statement = f"SELECT seq FROM sessions WHERE id = :id AND {IS_ALIVE}"
    row = db.execute(statement, {"id": session_id, "now": now}).fetchone()
    if row is None:
        raise SessionNotFoundError(f"no session {session_id!r}")
    return int(row[0])


def record_of(db: Db, seq: int) -> SessionRecord:
    """All about a session that is there."""
    return record(db, db.execute(f"SELECT {COLUMNS} FROM sessions WHERE seq = ?", [seq]).fetchone())


def record(db: Db, row: tuple[int, str, str, int, int, str, float | None, int]) -> SessionRecord:
    """A row of COLUMNS and its states."""
    seq, session_id, owner, created, version, metadata, expires_at, was_interrupted = row
    statement = f"SELECT {STATE} FROM states WHERE seq = ? ORDER BY n"
    *checkpoints, (head, position, nbytes, policy) = db.execute(statement, [seq]).fetchall()
    return SessionRecord(
        id=session_id,
        owner=owner,
        created=created,
        version=version,
        position=position,
        nbytes=nbytes,
        metadata=json.loads(metadata),
        expires_at=expires_at,
        head=head,
        checkpoints=tuple(digest for digest, *_ in checkpoints),
        was_interrupted=bool(was_interrupted),
        context_policy=policy,
    )


def insert(db: Db, new: NewSession, snapshot: State | None, now: float) -> SessionRecord:
    """A session of version 1 on a new snapshot, or on states that others have."""
    head, _, nbytes, _ = snapshot or stored(db, new.head or "")
    metadata = json.dumps(dict(new.metadata), ensure_ascii=False)
    cursor = db.execute(
        "INSERT INTO sessions (id, owner, created, metadata, expires_at) VALUES (?, ?, ?, ?, ?)",
        [f"sess-{token_hex(16)}", new.owner, int(now), metadata, new.expires_at],
    )
    states = [stored(db, digest) for digest in new.checkpoints]
    states.append((head, new.position, nbytes, new.context_policy))
    db.executemany(
        f"INSERT INTO states (seq, n, {STATE}) VALUES (?, ?, ?, ?, ?, ?)",
        [(cursor.lastrowid, n, *state) for n, state in enumerate(states)],
    )
    return record_of(db, cursor.lastrowid or 0)


def stored(db: Db, digest: str) -> State:
    """A state that a session has; SnapshotError where none has it."""
    statement = f"SELECT {STATE} FROM states WHERE digest = ? LIMIT 1"
    row: State | None = db.execute(statement, [digest]).fetchone()
    if row is None:
        raise SnapshotError(f"no snapshot {digest!r} is stored")
    return row


def push(db: Db, seq: int, state: State, max_checkpoints: int) -> list[str]:
    """A new head over the old ones; returns the digests of those dropped."""
    db.execute("UPDATE sessions SET was_interrupted = 0 WHERE seq = ?", [seq])
    [n] = db.execute(
        f"INSERT INTO states (seq, n, {STATE}) VALUES"
        " (?1, (SELECT max(n) + 1 FROM states WHERE seq = ?1), ?2, ?3, ?4, ?5) RETURNING n",
        (seq, *state),
    ).fetchone()
    return drop(db, seq, 0, n - max_checkpoints)


def pop(db: Db, seq: int) -> list[str]:
    """The newest checkpoint becomes the head; returns the old head's digest."""
    numbers = [n for (n,) in db.execute("SELECT n FROM states WHERE seq = ? ORDER BY n", [seq])]
    if len(numbers) < 2:
        raise NothingToRewindError("no earlier turn is kept of this session")
    return drop(db, seq, numbers[-1], numbers[-1] + 1)


def drop(db: Db, seq: int, start: int, stop: int) -> list[str]:
    """Forget states start <= n < stop of a session; their digests."""
    statement = "DELETE FROM states WHERE seq = ? AND n >= ? AND n < ? RETURNING digest"
    return [digest for (digest,) in db.execute(statement, [seq, start, stop]).fetchall()]


def remove(db: Db, seq: int) -> list[str]:
    """Forget a session; the digests of its states."""
    db.execute("DELETE FROM sessions WHERE seq = ?", [seq])
    rows = db.execute("DELETE FROM states WHERE seq = ? RETURNING digest", [seq]).fetchall()
    return [digest for (digest,) in rows]


def require_free(db: Db, seq: int, now: float) -> None:
    """SessionBusyError where somebody has it."""
    statement = f"SELECT 1 FROM sessions WHERE seq = :seq AND {IS_FREE}"
    if db.execute(statement, {"seq": seq, "now": now}).fetchone() is None:
        raise SessionBusyError("a turn has the session")


def expired(db: Db, now: float, limit: int) -> list[tuple[int, str]]:
    """Keys and ids of some that are past their time and that nobody has."""
    statement = f"SELECT seq, id FROM sessions WHERE expires_at <= :now AND {IS_FREE} LIMIT :limit"
    return db.execute(statement, {"now": now, "limit": limit}).fetchall()


def unreferenced(db: Db, digests: Iterable[str]) -> set[str]:
    """Those that no session has."""
    statement = "SELECT 1 FROM states WHERE digest = ? LIMIT 1"
    return {digest for digest in digests if db.execute(statement, [digest]).fetchone() is None}


def page(db: Db, owner: str, after: str | None, limit: int, now: float) -> tuple[Records, bool]:
    """An owner's sessions, newest first, behind `after`; whether there are more."""
    values = {"owner": owner, "now": now, "limit": limit + 1, "created": 0, "seq": 0}
    behind = ""
    if after is not None:
        place = "SELECT created, seq FROM sessions WHERE id = ? AND owner = ?"
        row = db.execute(place, [after, owner]).fetchone()
        if row is None:
            raise SessionNotFoundError(f"no session {after!r}")
        values["created"], values["seq"] = row
        behind = "AND (created, seq) < (:created, :seq)"
    statement = (
        f"SELECT {COLUMNS} FROM sessions WHERE owner = :owner AND {IS_ALIVE} {behind}"
        " ORDER BY created DESC, seq DESC LIMIT :limit"
    )
    rows = db.execute(statement, values).fetchall()
    return [record(db, row) for row in rows[:limit]], len(rows) > limit


IS_HELD = "id = :id AND fence = :fence AND lease_until IS NOT NULL"


def give(db: Db, session_id: str, owner: str, until: float, now: float) -> Lease:
    """The next fence; SessionBusyError while the last one is held and not past its time."""
    seq = seq_of(db, session_id, now)
    row = db.execute(
        "UPDATE sessions SET fence = fence + 1, lease_owner = :owner, lease_until = :until,"
        f" lease_version = version WHERE seq = :seq AND {IS_FREE} RETURNING fence, version",
        {"seq": seq, "owner": owner, "until": until, "now": now},
    ).fetchone()
    if row is None:
        raise SessionBusyError(f"another turn has session {session_id!r}")
    return Lease(session_id, *row)


def prolong(db: Db, held: Lease, until: float) -> None:
    """SessionMovedError where it is held no more."""
    cursor = db.execute(
        f"UPDATE sessions SET lease_until = :until WHERE {IS_HELD}",
        {"id": held.session_id, "fence": held.fence, "until": until},
    )
    if cursor.rowcount == 0:
        raise SessionMovedError(f"session {held.session_id!r} is no longer held by this turn")


def end(db: Db, held: Lease) -> None:
    """Nothing happens where it is held no more."""
    db.execute(
        "UPDATE sessions SET lease_owner = NULL, lease_until = NULL, lease_version = NULL"
        f" WHERE {IS_HELD}",
        {"id": held.session_id, "fence": held.fence},
    )


def advance(db: Db, held: Lease, expected_version: int) -> int:
    """The compare-and-set: version + 1 under the current fence, else SessionMovedError.

    Returns the row's key.
    """
    row = db.execute(
        f"UPDATE sessions SET version = version + 1 WHERE {IS_HELD} AND version = :version"
        " RETURNING seq",
        {"id": held.session_id, "fence": held.fence, "version": expected_version},
    ).fetchone()
    if row is None:
        raise SessionMovedError(
            f"session {held.session_id!r} is not at version {expected_version}, or was taken over"
        )
    return int(row[0])
