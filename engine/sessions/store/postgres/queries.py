"""The SQL of the store: sessions and leases.

Each function runs inside a transaction of its caller, at PostgreSQL's default isolation: a
statement sees what was committed before it began.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
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
    as_digest,
    change_blobs,
    find_state,
)
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
IS_HELD = "s.id = %(id)s AND s.fence = %(fence)s AND s.lease_owner = %(replica)s"
NO_LEASE = "lease_owner = NULL, lease_turn = NULL, lease_until = NULL, lease_version = NULL"
NUM_TURNS = 16
"""Of a session that are remembered by name, for commits in doubt."""
ADD_TURN = f"turns = ARRAY[%(turn)s::text] || s.turns[1:{NUM_TURNS - 1}]"
WAS_INTERRUPTED = (
    "(s.was_interrupted OR s.lease_owner IS NOT NULL AND s.lease_version = s.version"
    f" AND NOT {HOLDER_LIVES})"
)
"""A turn of a replica that died was cut, although nobody has taken the session over yet."""

STATES = (
    "(SELECT json_agg(json_build_array(encode(t.digest, 'hex'), t.n, t.position, t.nbytes,"
    " t.context_policy, t.events_nbytes) ORDER BY t.n)"
    " FROM cottention.states AS t WHERE t.seq = s.seq)"
)
RECORD = (
    "s.seq, s.id, s.owner, s.created, s.version, s.metadata, s.expires_at,"
    f" {WAS_INTERRUPTED}, s.head, {STATES}"
)


def to_record(row: Sequence[Any]) -> SessionRecord | None:
    """The record of a row of RECORD.

    None: a turn was committed while the row was read, and its states are not among those found;
    states that a rewind has just removed may be, and do not count.
    """
    _, session_id, owner, created, version, metadata, expires_at, was_interrupted, head, found = row
    states = [state for state in found or () if state[1] <= head]
    if not states or states[-1][1] != head:
        return None
    digest, _, position, nbytes, context_policy, events_nbytes = states[-1]
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
        checkpoints=tuple(state[0] for state in states[:-1]),
        was_interrupted=was_interrupted,
        context_policy=context_policy,
        events_nbytes=events_nbytes,
    )


def read_session(db: Db, session_id: str, *, may_be_over: bool = False) -> SessionRecord:
    """SessionNotFoundError where it is unknown, or has expired unless it `may_be_over`."""
    is_alive = "true" if may_be_over else IS_ALIVE
    statement = f"SELECT {RECORD} FROM cottention.sessions AS s WHERE s.id = %s AND {is_alive}"
    row = db.execute(statement, [session_id]).fetchone()
    if row is None:
        raise SessionNotFoundError(f"no session {session_id!r}")
    record = to_record(row)
    assert record is not None, "one statement sees a session and its states at one moment"
    return record


class Held(Exception):
    """A session is leased. is_late: its holder has missed beats, and may be dead."""

    def __init__(self, *, is_late: bool) -> None:
        self.is_late = is_late


def acquire(
    db: Db, session_id: str, owner: str | None, values: Params
) -> tuple[Lease, SessionRecord]:
    """Lease a session under the next fence, and read it, in one statement.

    values: replica, turn (the same for repetitions), seconds. Raises Held; SessionNotFoundError.
    """
    belongs = "s.id = %(id)s AND (%(owner)s::text IS NULL OR s.owner = %(owner)s)"
    values = {"id": session_id, "owner": owner, "missed": MISSED_SECONDS, **values}
    row = db.execute(
        "UPDATE cottention.sessions AS s SET fence = s.fence + 1, lease_owner = %(replica)s,"
        " lease_turn = %(turn)s, lease_version = s.version,"
        " lease_until = clock_timestamp() + make_interval(secs => %(seconds)s),"
        f" was_interrupted = {WAS_INTERRUPTED}"
        f" WHERE {belongs} AND {IS_ALIVE} AND {IS_FREE} RETURNING s.fence, {RECORD}",
        values,
    ).fetchone()
    if row is not None:
        fence, *session = row
        record = to_record(session) or read_session(db, session_id, may_be_over=True)
        return Lease(session_id, fence, record.version), record
    late = (
        "(SELECT r.until - clock_timestamp() < make_interval(secs => %(missed)s)"
        " FROM cottention.replicas AS r WHERE r.id = s.lease_owner)"
    )
    found = db.execute(
        f"SELECT coalesce({late}, true) FROM cottention.sessions AS s"
        f" WHERE {belongs} AND {IS_ALIVE}",
        values,
    ).fetchone()
    if found is None:
        raise SessionNotFoundError(f"no session {session_id!r}")
    raise Held(is_late=found[0])


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
    expected_version: int,
    blob: Blob,
    max_checkpoints: int,
    turn: str,
    replica: str,
    *,
    keeps_lease: bool,
    check: Callable[[str, int], None],
) -> SessionRecord:
    """Make `blob` the session's head, drop states beyond `max_checkpoints`; the session after it.

    check: of the owner, after the session has grown by so many bytes. SessionMovedError: the lease
    is no longer held, or the version is another.
    """
    values = {
        **of_lease(lease, replica),
        "version": expected_version,
        "n": expected_version + 1,
        "turn": turn,
        "digest": blob.digest,
        "position": blob.position,
        "nbytes": len(blob.raw),
        "policy": blob.context_policy,
        "events": blob.events_nbytes,
        "keep": max_checkpoints,
    }
    release = "" if keeps_lease else f", {NO_LEASE}"
    row = db.execute(
        "WITH dropped AS ("
        "  DELETE FROM cottention.states AS t USING cottention.sessions AS s"
        f" WHERE {IS_HELD} AND s.version = %(version)s AND t.seq = s.seq AND t.n NOT IN ("
        "     SELECT o.n FROM cottention.states AS o WHERE o.seq = s.seq ORDER BY o.n DESC"
        "     LIMIT %(keep)s) RETURNING t.digest, t.nbytes),"
        " moved AS ("
        f" UPDATE cottention.sessions AS s SET version = %(n)s, head = %(n)s{release}, {ADD_TURN},"
        "  was_interrupted = false, nbytes = s.nbytes + %(nbytes)s"
        "   - (SELECT coalesce(sum(nbytes), 0) FROM dropped)::bigint"
        f" WHERE {IS_HELD} AND s.version = %(version)s RETURNING s.seq, s.owner, s.created,"
        "  s.metadata, s.expires_at),"
        " pushed AS ("
        " INSERT INTO cottention.states (seq, n, digest, position, nbytes, context_policy,"
        "  events_nbytes)"
        "  SELECT seq, %(n)s, %(digest)s, %(position)s, %(nbytes)s, %(policy)s, %(events)s"
        "  FROM moved)"
        " SELECT owner, created, metadata, expires_at,"
        " (SELECT array_agg(digest) FROM dropped),"
        " (SELECT coalesce(sum(nbytes), 0) FROM dropped)::bigint,"
        # the states as they were before this statement
        " (SELECT array_agg(t.digest ORDER BY t.n) FROM cottention.states AS t"
        "  WHERE t.seq = moved.seq)"
        " FROM moved",
        values,
    ).fetchone()
    if row is None:
        raise _moved(lease, expected_version)
    owner, created, metadata, expires_at, dropped, dropped_nbytes, before = row
    check(owner, len(blob.raw) - dropped_nbytes)
    change_blobs(db, [blob], dropped or [])
    return SessionRecord(
        id=lease.session_id,
        owner=owner,
        created=created,
        version=expected_version + 1,
        position=blob.position,
        nbytes=len(blob.raw),
        metadata=json.loads(metadata),
        expires_at=expires_at,
        head=blob.digest.hex(),
        checkpoints=tuple(digest.hex() for digest in before[len(dropped or []) :]),
        was_interrupted=False,
        context_policy=blob.context_policy,
        events_nbytes=blob.events_nbytes,
    )


def find_commit(
    db: Db, lease: Lease, expected_version: int, blob: Blob, turn: str
) -> SessionRecord | None:
    """The session as this turn has left it; None where it has left nothing.

    StoreUnreachableError: too many turns have followed to tell.
    """
    row = db.execute(
        f"SELECT s.version, s.turns, {RECORD} FROM cottention.sessions AS s WHERE s.id = %s",
        [lease.session_id],
    ).fetchone()
    if row is None:
        return None
    version, turns, *session = row
    age = version - (expected_version + 1)
    if not _is_made_by(turn, turns, age, lease):
        return None
    record = to_record(session)
    if age == 0 or record is None:
        return record
    return replace(
        record,
        version=expected_version + 1,
        position=blob.position,
        nbytes=len(blob.raw),
        head=blob.digest.hex(),
        checkpoints=(),  # they may be gone
        context_policy=blob.context_policy,
        events_nbytes=blob.events_nbytes,
    )


def is_rewound(db: Db, lease: Lease, expected_version: int, turn: str) -> bool:
    """Whether a rewind of this name was done. StoreUnreachableError, as in `find_commit`."""
    row = db.execute(
        "SELECT version, turns FROM cottention.sessions WHERE id = %s", [lease.session_id]
    ).fetchone()
    return row is not None and _is_made_by(turn, row[1], row[0] - (expected_version + 1), lease)


def _is_made_by(turn: str, turns: Sequence[str], age: int, lease: Lease) -> bool:
    """Whether `turn` made the version that is `age` versions old."""
    if age >= NUM_TURNS:
        raise StoreUnreachableError(
            f"the connection broke while a turn of session {lease.session_id!r} was stored, and"
            f" {age} have followed: it may be among those before them"
        )
    return 0 <= age < len(turns) and turns[age] == turn


def rewind(db: Db, lease: Lease, expected_version: int, turn: str, replica: str) -> None:
    """Make the newest checkpoint the head. NothingToRewindError; SessionMovedError."""
    values = {**of_lease(lease, replica), "version": expected_version, "turn": turn}
    row = db.execute(
        f"UPDATE cottention.sessions AS s SET version = s.version + 1, {ADD_TURN}"
        f" WHERE {IS_HELD} AND s.version = %(version)s RETURNING s.seq, s.head",
        values,
    ).fetchone()
    if row is None:
        raise _moved(lease, expected_version)
    seq, head = row
    [[before]] = db.execute(
        "SELECT max(n) FROM cottention.states WHERE seq = %s AND n < %s", [seq, head]
    ).fetchall()
    if before is None:
        raise NothingToRewindError("no earlier turn of this session is stored")
    [[digest, nbytes]] = db.execute(
        "DELETE FROM cottention.states WHERE seq = %s AND n = %s RETURNING digest, nbytes",
        [seq, head],
    ).fetchall()
    db.execute(
        "UPDATE cottention.sessions SET head = %s, nbytes = nbytes - %s WHERE seq = %s",
        [before, nbytes, seq],
    )
    change_blobs(db, [], [digest])


def insert_session(db: Db, session_id: str, new: NewSession, blob: Blob | None) -> None:
    """A session of version 1, whose blobs are counted already."""
    names = [*new.checkpoints, *([] if blob else [new.head or ""])]
    states = [find_state(db, as_digest(name)) for name in names]
    if blob is not None:
        states.append(blob.state)
    text = json.dumps(dict(new.metadata))
    nbytes = len(text) + sum(state.nbytes for state in states)
    [[seq]] = db.execute(
        "INSERT INTO cottention.sessions"
        " (id, owner, created, head, nbytes, metadata, expires_at)"
        f" VALUES (%s, %s, floor({NOW})::bigint, 1, %s, %s, %s) RETURNING seq",
        [session_id, new.owner, nbytes, text, new.expires_at],
    ).fetchall()
    first = 2 - len(states)  # the head's number is the session's version, 1
    with db.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO cottention.states (seq, n, digest, position, nbytes, context_policy,"
            " events_nbytes) VALUES (%s, %s, %s, %s, %s, %s, %s)",
            [(seq, n, *state) for n, state in enumerate(states, first)],
        )


def read_sessions(db: Db, ids: Sequence[str]) -> Records:
    """The records of sessions that exist, in this order."""
    return [read_session(db, session_id, may_be_over=True) for session_id in ids]


def new_id() -> str:
    """A session's id."""
    return f"sess-{token_hex(16)}"


def delete(db: Db, session_id: str, replica: str) -> None:
    """SessionBusyError; SessionNotFoundError."""
    values = {"id": session_id, "replica": replica, "turn": ""}
    row = db.execute(
        f"SELECT s.seq, {IS_FREE} FROM cottention.sessions AS s"
        f" WHERE s.id = %(id)s AND {IS_ALIVE} FOR UPDATE OF s",
        values,
    ).fetchone()
    if row is None:
        raise SessionNotFoundError(f"no session {session_id!r}")
    seq, is_free = row
    if not is_free:
        raise SessionBusyError("a turn has the session")
    remove(db, [seq])


def remove(db: Db, seqs: Sequence[int]) -> None:
    """Delete sessions whose rows are locked, and the blobs that only they have."""
    db.execute("DELETE FROM cottention.sessions WHERE seq = ANY(%s)", [seqs])
    gone = db.execute(
        "DELETE FROM cottention.states WHERE seq = ANY(%s) RETURNING digest", [seqs]
    ).fetchall()
    change_blobs(db, [], [digest for (digest,) in gone])


def expire(db: Db, limit: int, replica: str) -> list[str]:
    """Delete sessions that have expired and are not leased; their ids.

    Those that another replica deletes at this moment are left to it.
    """
    rows = db.execute(
        f"SELECT s.seq, s.id FROM cottention.sessions AS s WHERE s.expires_at <= {NOW}"
        f" AND {IS_FREE} LIMIT %(limit)s FOR UPDATE OF s SKIP LOCKED",
        {"limit": limit, "replica": replica, "turn": ""},
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
    found = [record for row in rows[:limit] if (record := to_record(row)) is not None]
    return found, len(rows) > limit


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


def _moved(lease: Lease, expected_version: int) -> SessionMovedError:
    return SessionMovedError(
        f"session {lease.session_id!r} is not at version {expected_version}, or was taken over"
    )
