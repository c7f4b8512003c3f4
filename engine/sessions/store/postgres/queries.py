"""The SQL of the store: sessions and leases.

Each function runs inside a transaction of its caller, at PostgreSQL's default isolation: a
statement sees what was committed before it began.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from secrets import token_hex
from typing import Any

import psycopg

from cottention.engine.errors import (
    NothingToRewindError,
    SessionBusyError,
    SessionMovedError,
    SessionNotFoundError,
    StoreUnreachableError,
)
from cottention.engine.sessions.store.postgres.blobs import (
    Blob,
    State,
    as_digest,
    change_blobs,
    find_state,
)
from cottention.engine.sessions.store.postgres.functions import NUM_TURNS
from cottention.engine.sessions.store.postgres.replica import MISSED_SECONDS
from cottention.engine.sessions.store.protocol import (
    Lease,
    NewSession,
    Records,
    SessionRecord,
    Usage,
)

Db = psycopg.Connection[Any]
Params = dict[str, Any]

NOW = "extract(epoch FROM clock_timestamp())::float8"
IS_ALIVE = f"(s.expires_at IS NULL OR s.expires_at > {NOW})"
HOLDER_LIVES = (
    "EXISTS (SELECT FROM cottention.replicas AS r"
    " WHERE r.id = s.lease_owner AND r.until > clock_timestamp())"
)
GOES_ON = "EXISTS (SELECT FROM cottention.turns AS j WHERE j.session = s.id AND j.fence = s.fence)"
"""A turn that goes on without its client: where its replica is dead, another adopts it."""
IS_FREE = (
    "(s.lease_owner IS NULL"
    " OR s.lease_owner = %(replica)s AND s.lease_turn = %(turn)s"
    f" OR (s.lease_until <= clock_timestamp() OR NOT {HOLDER_LIVES}) AND NOT {GOES_ON})"
)
BELONGS = "s.id = %(id)s AND (%(owner)s::text IS NULL OR s.owner = %(owner)s)"
IS_HELD = "s.id = %(id)s AND s.fence = %(fence)s AND s.lease_owner = %(replica)s"
NO_LEASE = "lease_owner = NULL, lease_turn = NULL, lease_until = NULL, lease_version = NULL"
NO_TURN = -1
"""No turn's name: whoever leases nothing for itself."""
ADD_TURN = f"turns = %(turn)s::bigint || s.turns[1:{NUM_TURNS - 1}]"
WAS_INTERRUPTED = (
    "(s.was_interrupted OR s.lease_owner IS NOT NULL AND s.lease_version = s.version"
    f" AND NOT {HOLDER_LIVES} AND NOT {GOES_ON})"
)
"""A turn of a replica that died was cut, although nobody has taken the session over yet. One that
goes on without its replica was not."""

RECORD = (
    f"s.id, s.owner, s.created, s.version, s.metadata, s.expires_at, {WAS_INTERRUPTED}, s.states"
)


@dataclass(frozen=True, slots=True)
class Stored:
    """A session as it is stored at one version: its states, the head last, never change there."""

    record: SessionRecord
    states: tuple[State, ...]

    def after(self, blob: Blob, max_checkpoints: int) -> tuple["Stored", list[bytes]]:
        """With `blob` as its head, at the next version; and the digests of dropped states."""
        first = max(0, len(self.states) - max_checkpoints)
        states = (*self.states[first:], blob.state)
        record = replace(
            self.record,
            version=self.record.version + 1,
            position=blob.position,
            nbytes=len(blob.raw),
            head=blob.digest.hex(),
            checkpoints=tuple(state.digest.hex() for state in states[:-1]),
            was_interrupted=False,
            context_policy=blob.context_policy,
            events_nbytes=blob.events_nbytes,
        )
        return Stored(record, states), [state.digest for state in self.states[:first]]

    @property
    def nbytes(self) -> int:
        """Of metadata and states, as `sessions.nbytes` counts them."""
        return _total_nbytes(json.dumps(dict(self.record.metadata)), self.states)


def _total_nbytes(metadata: str, states: Iterable[State]) -> int:
    return len(metadata) + sum(state.nbytes for state in states)


def _as_json(states: Iterable[State]) -> str:
    return json.dumps([state.listed() for state in states])


def to_record(row: Sequence[Any]) -> SessionRecord:
    """The record of a row of RECORD."""
    return to_stored(row).record


def to_stored(row: Sequence[Any]) -> Stored:
    """A row of RECORD."""
    session_id, owner, created, version, metadata, expires_at, was_interrupted, found = row
    states = tuple(map(State.of_list, found))
    head = states[-1]
    record = SessionRecord(
        id=session_id,
        owner=owner,
        created=created,
        version=version,
        position=head.position,
        nbytes=head.nbytes,
        metadata=json.loads(metadata),
        expires_at=expires_at,
        head=head.digest.hex(),
        checkpoints=tuple(state.digest.hex() for state in states[:-1]),
        was_interrupted=was_interrupted,
        context_policy=head.context_policy,
        events_nbytes=head.events_nbytes,
    )
    return Stored(record, states)


def read_session(db: Db, session_id: str, *, may_be_over: bool = False) -> Stored:
    """SessionNotFoundError where it is unknown, or has expired unless it `may_be_over`."""
    is_alive = "true" if may_be_over else IS_ALIVE
    statement = f"SELECT {RECORD} FROM cottention.sessions AS s WHERE s.id = %s AND {is_alive}"
    row = db.execute(statement, [session_id]).fetchone()
    if row is None:
        raise SessionNotFoundError(f"no session {session_id!r}")
    return to_stored(row)


def acquire(db: Db, session_id: str, owner: str | None, values: Params) -> tuple[Lease, Stored]:
    """Lease a session under the next fence, and read it, in one statement.

    values: replica, turn (the same for repetitions), seconds.
    Raises SessionBusyError; SessionNotFoundError.
    """
    values = {"id": session_id, "owner": owner, "missed": MISSED_SECONDS, **values}
    [[row]] = db.execute(
        "SELECT cottention.acquire_v1(%(id)s, %(owner)s, %(replica)s, %(turn)s, %(seconds)s)",
        values,
    ).fetchall()
    row = row or _take_over(db, values)
    if row is not None:
        fence, *session = row
        stored = to_stored(session)
        return Lease(session_id, fence, stored.record.version), stored
    late = (
        "(SELECT r.until - clock_timestamp() < make_interval(secs => %(missed)s)"
        " FROM cottention.replicas AS r WHERE r.id = s.lease_owner)"
    )
    found = db.execute(
        f"SELECT coalesce({late}, true) FROM cottention.sessions AS s"
        f" WHERE {BELONGS} AND {IS_ALIVE}",
        values,
    ).fetchone()
    if found is None:
        raise SessionNotFoundError(f"no session {session_id!r}")
    raise SessionBusyError(f"another turn has session {session_id!r}", is_late=found[0])


def _take_over(db: Db, values: Params) -> Sequence[Any] | None:
    """Lease a session whose holder's time is over, or that a first try has leased for us."""
    return db.execute(
        "UPDATE cottention.sessions AS s SET fence = s.fence + 1, lease_owner = %(replica)s,"
        " lease_turn = %(turn)s, lease_version = s.version,"
        " lease_until = clock_timestamp() + make_interval(secs => %(seconds)s),"
        f" was_interrupted = {WAS_INTERRUPTED}"
        f" WHERE {BELONGS} AND {IS_ALIVE} AND {IS_FREE} RETURNING s.fence, {RECORD}",
        values,
    ).fetchone()


def renew(db: Db, lease: Lease, replica: str, seconds: float) -> None:
    """SessionMovedError where it is no longer held."""
    cursor = db.execute(
        "UPDATE cottention.sessions AS s"
        " SET lease_until = clock_timestamp() + make_interval(secs => %(seconds)s)"
        f" WHERE {IS_HELD}",
        {**of_lease(lease, replica), "seconds": seconds},
    )
    if cursor.rowcount == 0:
        raise SessionMovedError(f"session {lease.session_id!r} is no longer held by this turn")


def release(db: Db, lease: Lease, replica: str) -> None:
    """Nothing happens where it is no longer held."""
    statement = f"UPDATE cottention.sessions AS s SET {NO_LEASE} WHERE {IS_HELD}"
    db.execute(statement, of_lease(lease, replica))


def commit(
    db: Db,
    lease: Lease,
    stored: Stored,
    blob: Blob,
    max_checkpoints: int,
    turn: int,
    replica: str,
    *,
    keeps_lease: bool,
    may_replace: bool,
) -> Stored:
    """Make `blob` the head of a session that is as `stored`, drop states beyond `max_checkpoints`.

    One statement: a transaction by itself, or a part of one. Returns the session after it.
    may_replace: the blob may take the row of one that goes, which is less work; UniqueViolation
    where it is stored already. SessionMovedError: the lease is no longer held, or the version is
    another.
    """
    after, dropped = stored.after(blob, max_checkpoints)
    changed = [*dropped, blob.digest]
    if blob.digest in dropped:  # it goes and comes: its count stays as it is
        dropped.remove(blob.digest)
        changed = dropped
    values = {
        **of_lease(lease, replica),
        "version": stored.record.version,
        "turn": turn,
        "keeps": keeps_lease,
        "states": _as_json(after.states),
        "total": after.nbytes,
        "changed": sorted(changed),
        "digest": blob.digest,
        "position": blob.position,
        "nbytes": len(blob.raw),
        "policy": blob.context_policy,
        "events": blob.events_nbytes,
        "bytes": blob.deflated(),
        "replaced": dropped[0] if may_replace and len(dropped) == 1 else None,
    }
    [[is_done]] = db.execute(
        "SELECT cottention.commit_v1(%(id)s, %(fence)s, %(replica)s, %(version)s, %(turn)s,"
        " %(keeps)s, %(states)s, %(total)s, %(changed)s, %(digest)s, %(position)s, %(nbytes)s,"
        " %(policy)s, %(events)s, %(bytes)s, %(replaced)s)",
        values,
    ).fetchall()
    if not is_done:
        raise moved(lease, stored.record.version)
    return after


def find_commit(
    db: Db, lease: Lease, expected_version: int, blob: Blob, turn: int
) -> Stored | None:
    """The session as this turn has left it; None where it has left nothing.

    StoreUnreachableError: too many turns have followed to tell.
    """
    row = db.execute(
        f"SELECT s.turns, {RECORD} FROM cottention.sessions AS s WHERE s.id = %s",
        [lease.session_id],
    ).fetchone()
    if row is None:
        return None
    turns, *session = row
    stored = to_stored(session)
    age = stored.record.version - (expected_version + 1)
    if not _is_made_by(turn, turns, age, lease):
        return None
    if age == 0:
        return stored
    # later turns have followed: what else there was then may be gone
    earlier = replace(stored.record, version=expected_version)
    return Stored(earlier, ()).after(blob, 0)[0]


def is_rewound(db: Db, lease: Lease, expected_version: int, turn: int) -> bool:
    """Whether a rewind of this name was done. StoreUnreachableError, as in `find_commit`."""
    row = db.execute(
        "SELECT version, turns FROM cottention.sessions WHERE id = %s", [lease.session_id]
    ).fetchone()
    return row is not None and _is_made_by(turn, row[1], row[0] - (expected_version + 1), lease)


def _is_made_by(turn: int, turns: Sequence[int], age: int, lease: Lease) -> bool:
    """Whether `turn` made the version that is `age` versions old."""
    if age >= NUM_TURNS:
        raise StoreUnreachableError(
            f"the connection broke while a turn of session {lease.session_id!r} was stored, and"
            f" {age} have followed: it may be among those before them"
        )
    return 0 <= age < len(turns) and turns[age] == turn


def rewind(db: Db, lease: Lease, expected_version: int, turn: int, replica: str) -> Stored:
    """Make the newest checkpoint the head. NothingToRewindError; SessionMovedError."""
    values = {**of_lease(lease, replica), "version": expected_version, "turn": turn}
    row = db.execute(
        "SELECT s.metadata, s.states FROM cottention.sessions AS s"
        f" WHERE {IS_HELD} AND s.version = %(version)s FOR UPDATE",
        values,
    ).fetchone()
    if row is None:
        raise moved(lease, expected_version)
    metadata, found = row
    *states, head = map(State.of_list, found)
    if not states:
        raise NothingToRewindError("no earlier turn of this session is stored")
    values |= {"states": _as_json(states), "total": _total_nbytes(metadata, states)}
    db.execute(
        "UPDATE cottention.sessions AS s SET version = s.version + 1, states = %(states)s::json,"
        f" nbytes = %(total)s, {ADD_TURN} WHERE s.id = %(id)s",
        values,
    )
    change_blobs(db, [], [head.digest])
    return read_session(db, lease.session_id, may_be_over=True)


def insert_session(db: Db, session_id: str, new: NewSession, blob: Blob | None) -> None:
    """A session of version 1, whose blobs are counted already."""
    names = [*new.checkpoints, *([] if blob else [new.head or ""])]
    states = [find_state(db, as_digest(name)) for name in names]
    if blob is not None:
        states.append(blob.state)
    text = json.dumps(dict(new.metadata))
    db.execute(
        "INSERT INTO cottention.sessions"
        " (id, owner, created, nbytes, metadata, states, expires_at)"
        f" VALUES (%s, %s, floor({NOW})::bigint, %s, %s, %s, %s)",
        [
            *(session_id, new.owner, _total_nbytes(text, states), text),
            *(_as_json(states), new.expires_at),
        ],
    )


def read_sessions(db: Db, ids: Sequence[str]) -> Records:
    """The records of sessions, in this order. SessionNotFoundError where one does not exist."""
    rows = db.execute(
        f"SELECT {RECORD} FROM cottention.sessions AS s WHERE s.id = ANY(%s)", [[*ids]]
    ).fetchall()
    found = {record.id: record for record in map(to_record, rows)}
    for session_id in ids:
        if session_id not in found:
            raise SessionNotFoundError(f"no session {session_id!r}")
    return [found[session_id] for session_id in ids]


def new_id() -> str:
    """A session's id."""
    return f"sess-{token_hex(16)}"


def delete(db: Db, session_id: str, replica: str) -> None:
    """SessionBusyError; SessionNotFoundError."""
    values = {"id": session_id, "replica": replica, "turn": NO_TURN}
    row = db.execute(
        f"SELECT s.seq, {IS_FREE} FROM cottention.sessions AS s"
        f" WHERE s.id = %(id)s AND {IS_ALIVE} FOR UPDATE OF s",
        values,
    ).fetchone()
    if row is None:
        raise SessionNotFoundError(f"no session {session_id!r}")
    seq, is_free = row
    if not is_free:
        raise SessionBusyError("a turn has the session: try again when it has ended, or cancel it")
    remove(db, [seq])


def remove(db: Db, seqs: Sequence[int]) -> None:
    """Delete sessions whose rows are locked, and the blobs that only they have."""
    rows = db.execute(
        "DELETE FROM cottention.sessions WHERE seq = ANY(%s) RETURNING states", [seqs]
    ).fetchall()
    change_blobs(db, [], [State.of_list(each).digest for (states,) in rows for each in states])


def expire(db: Db, limit: int, replica: str) -> list[str]:
    """Delete sessions that have expired and are not leased; their ids.

    Those that another replica deletes at this moment are left to it.
    """
    rows = db.execute(
        f"SELECT s.seq, s.id FROM cottention.sessions AS s WHERE s.expires_at <= {NOW}"
        f" AND {IS_FREE} LIMIT %(limit)s FOR UPDATE OF s SKIP LOCKED",
        {"limit": limit, "replica": replica, "turn": NO_TURN},
    ).fetchall()
    if rows:
        remove(db, [seq for seq, _ in rows])
    return [session_id for _, session_id in rows]


def list_sessions(db: Db, owner: str, after: str | None, limit: int) -> tuple[Records, bool]:
    """An owner's sessions, newest first, after `after`; whether there are more."""
    values: Params = {"owner": owner, "limit": limit + 1, "after": after}
    behind = ""
    if after is not None:
        place = "SELECT 1 FROM cottention.sessions WHERE id = %(after)s AND owner = %(owner)s"
        if db.execute(place, values).fetchone() is None:
            raise SessionNotFoundError(f"no session {after!r}")
        behind = "AND s.seq < (SELECT seq FROM cottention.sessions WHERE id = %(after)s)"
    rows = db.execute(
        f"SELECT {RECORD} FROM cottention.sessions AS s"
        f" WHERE s.owner = %(owner)s AND {IS_ALIVE} {behind} ORDER BY s.seq DESC LIMIT %(limit)s",
        values,
    ).fetchall()
    return [to_record(row) for row in rows[:limit]], len(rows) > limit


def usage_of(db: Db, owner: str) -> Usage:
    """What an owner's sessions take; others of the owner wait until the transaction ends."""
    db.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [owner])
    [row] = db.execute(
        "SELECT count(*), coalesce(sum(nbytes), 0)::bigint FROM cottention.sessions"
        " WHERE owner = %s",
        [owner],
    ).fetchall()
    return (row[0], row[1])


def of_lease(lease: Lease, replica: str) -> Params:
    """What IS_HELD needs to know."""
    return {"id": lease.session_id, "fence": lease.fence, "replica": replica}


def moved(lease: Lease, expected_version: int) -> SessionMovedError:
    """The error of a turn whose session another one has, or has changed."""
    return SessionMovedError(
        f"session {lease.session_id!r} is not at version {expected_version}, or was taken over"
    )
