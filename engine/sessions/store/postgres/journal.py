"""`PostgresJournal`: turns that go on without their client, and their chunks, as rows.

A row of `turns` counts under the fence of its session's lease alone: one that was left over by a
turn whose session has moved is as none.
"""

import struct
import threading
from collections.abc import Iterable, Sequence
from secrets import randbits
from typing import Any

from cottention.engine.errors import SessionMovedError, SessionNotFoundError
from cottention.engine.sessions.store.journal import (
    MAX_TRIES,
    Adopted,
    Chunk,
    Holder,
    JournaledTurn,
    SessionJournal,
)
from cottention.engine.sessions.store.postgres import queries
from cottention.engine.sessions.store.postgres.connections import Connections, Db
from cottention.engine.sessions.store.postgres.replica import Replica
from cottention.engine.sessions.store.protocol import Lease, SessionRecord

MAX_WAITING = 4
"""Turns that a replica adopts at a time, so that all of them share those of a dead one."""

COLUMNS = {
    "owner": "text",
    "turn": "text",
    "name": "text",
    "path": "text",
    "body": "bytea",
    "seed": "bigint",
    "created": "bigint",
    "deadline": "double precision",
    "key": "text",
    "token": "text",
}
"""The fields of a JournaledTurn, and their types in the table."""
HAS_GONE_ON = (
    "EXISTS (SELECT FROM cottention.chunks AS c WHERE c.session = j.session AND c.fence = j.fence)"
)
IS_WAITING = f"(s.lease_until <= clock_timestamp() OR NOT {queries.HOLDER_LIVES})"
JOINED = (
    "cottention.turns AS j JOIN cottention.sessions AS s ON s.id = j.session AND s.fence = j.fence"
)


class PostgresJournal(SessionJournal):
    """See SessionJournal. model: a turn is adopted by servers of the same one."""

    def __init__(self, connections: Connections, replica: Replica, model: str) -> None:
        self._connections = connections
        self._replica = replica
        self._model = model
        self._leases: set[Lease] = set()
        self._lock = threading.Lock()

    @property
    def life(self) -> int | None:
        return self._replica.life if self._replica.is_alive else None

    @property
    def is_steady(self) -> bool:
        return self._replica.is_steady

    def begin(self, lease: Lease, turn: JournaledTurn) -> None:
        values = {name: getattr(turn, name) for name in COLUMNS}
        names = ", ".join(COLUMNS)
        news = ", ".join(f"{name} = excluded.{name}" for name in ["fence", "model", *COLUMNS])
        places = ", ".join(f"%({name})s::{kind}" for name, kind in COLUMNS.items())

        def change(db: Db) -> None:
            made = db.execute(
                f"INSERT INTO cottention.turns (session, fence, model, {names})"
                f" SELECT s.id, s.fence, %(model)s::text, {places} FROM cottention.sessions AS s"
                f" WHERE {queries.IS_HELD} FOR SHARE OF s"
                f" ON CONFLICT (session) DO UPDATE SET tries = 0, {news} RETURNING 1",
                {**queries.of_lease(lease, self._replica.id), **values, "model": self._model},
            ).fetchone()
            if made is None:
                raise SessionMovedError(f"session {lease.session_id!r} was taken over")
            db.execute("DELETE FROM cottention.chunks WHERE session = %s", [lease.session_id])

        self._connections.write(change)
        with self._lock:
            self._leases.add(lease)

    def append(self, chunks: Iterable[Chunk]) -> set[Lease]:
        new = [*chunks]
        leases = {(each.lease.session_id, each.lease.fence): each.lease for each in new}

        def change(db: Db) -> set[Lease]:
            # the lock makes who adopts the turn wait until these are stored, or these find it gone
            rows = db.execute(
                "INSERT INTO cottention.chunks AS c (session, fence, n, ids, events)"
                " SELECT u.session, u.fence, u.n, u.ids, u.events FROM"
                " unnest(%s::text[], %s::bigint[], %s::bigint[], %s::bytea[], %s::bytea[])"
                " AS u(session, fence, n, ids, events)"
                " JOIN cottention.turns AS j ON j.session = u.session AND j.fence = u.fence"
                " FOR SHARE OF j"
                " ON CONFLICT (session, fence, n) DO UPDATE SET n = c.n"
                " RETURNING c.session, c.fence",
                [
                    [each.lease.session_id for each in new],
                    [each.lease.fence for each in new],
                    [each.n for each in new],
                    [struct.pack(f"<{len(each.ids)}i", *each.ids) for each in new],
                    [each.events for each in new],
                ],
            ).fetchall()
            return {leases[session, fence] for session, fence in rows}

        return self._connections.write(change)

    def holds(self, lease: Lease) -> bool:
        statement = f"SELECT 1 FROM cottention.sessions AS s WHERE {queries.IS_HELD}"
        values = queries.of_lease(lease, self._replica.id)
        row = self._connections.statement(lambda db: db.execute(statement, values).fetchone())
        return row is not None

    def waiting(self) -> Sequence[str]:
        def find(db: Db) -> list[str]:
            db.execute(
                f"DELETE FROM cottention.turns WHERE session IN (SELECT j.session FROM {JOINED}"
                f" WHERE j.tries >= %s AND NOT {HAS_GONE_ON} AND {IS_WAITING}"
                " FOR UPDATE OF j SKIP LOCKED)",
                [MAX_TRIES],
            )
            rows = db.execute(
                f"SELECT j.session FROM {JOINED} WHERE j.model = %s AND {IS_WAITING}"
                " ORDER BY random() LIMIT %s",
                [self._model, MAX_WAITING],
            ).fetchall()
            return [session for (session,) in rows]

        return self._connections.statement(find)

    def adopt(self, session_id: str, ttl_seconds: float) -> Adopted | None:
        turn = randbits(63)
        values = {
            "id": session_id,
            "replica": self._replica.id,
            "turn": turn,
            "seconds": ttl_seconds,
            "model": self._model,
        }

        def change(db: Db) -> Adopted | None:
            row = db.execute(
                "UPDATE cottention.sessions AS s SET fence = s.fence + 1,"
                " lease_owner = %(replica)s, lease_turn = %(turn)s, lease_version = s.version,"
                " lease_until = clock_timestamp() + make_interval(secs => %(seconds)s)"
                " FROM cottention.turns AS j WHERE s.id = %(id)s AND j.session = s.id"
                f" AND j.fence = s.fence AND j.model = %(model)s AND {IS_WAITING}"
                f" RETURNING s.fence, {queries.RECORD}",
                values,
            ).fetchone()
            if row is None:
                return None
            fence, *session = row
            # who has told nothing since it adopted the turn may have died of it
            db.execute(
                "UPDATE cottention.turns AS j SET fence = %(fence)s,"
                f" tries = CASE WHEN {HAS_GONE_ON} THEN 1 ELSE j.tries + 1 END"
                " WHERE session = %(id)s",
                {"id": session_id, "fence": fence},
            )
            db.execute(
                "UPDATE cottention.answers AS a SET replica = %s FROM cottention.turns AS j"
                " WHERE j.session = %s AND a.owner = j.owner AND a.key = j.key"
                " AND a.token = j.token",
                [self._replica.id, session_id],
            )
            record = queries.to_stored(session).record
            return self._adopted(db, Lease(session_id, fence, record.version), record)

        def find(db: Db) -> Adopted | None:
            row = db.execute(
                "SELECT fence FROM cottention.sessions WHERE id = %(id)s"
                " AND lease_owner = %(replica)s AND lease_turn = %(turn)s",
                values,
            ).fetchone()
            if row is None:
                return None
            record = queries.read_session(db, session_id, may_be_over=True).record
            return self._adopted(db, Lease(session_id, row[0], record.version), record)

        adopted = self._connections.write(change, find)
        if adopted is not None:
            with self._lock:
                self._leases.add(adopted.lease)
        return adopted

    def _adopted(self, db: Db, lease: Lease, record: SessionRecord) -> Adopted | None:
        session = [lease.session_id]
        names = ", ".join(COLUMNS)
        row = db.execute(
            f"SELECT {names} FROM cottention.turns WHERE session = %s", session
        ).fetchone()
        if row is None:
            return None
        values: dict[str, Any] = dict(zip(COLUMNS, row, strict=True))
        values["body"] = bytes(values["body"])
        chunks = db.execute(
            "SELECT ids, events FROM cottention.chunks WHERE session = %s ORDER BY fence, n",
            session,
        ).fetchall()
        raw = b"".join(bytes(ids) for ids, _ in chunks)
        return Adopted(
            lease,
            record,
            JournaledTurn(**values),
            struct.unpack(f"<{len(raw) // 4}i", raw),
            b"".join(bytes(events) for _, events in chunks),
        )

    def hand_over(self, lease: Lease, *, has_failed: bool = False) -> None:
        def change(db: Db) -> None:
            if not has_failed:
                db.execute(
                    "UPDATE cottention.turns SET tries = 0 WHERE session = %s AND fence = %s",
                    [lease.session_id, lease.fence],
                )
            db.execute(
                "UPDATE cottention.sessions AS s SET lease_owner = '',"
                f" lease_until = clock_timestamp() WHERE {queries.IS_HELD}",
                queries.of_lease(lease, self._replica.id),
            )

        self._connections.write(change)
        self.forget(lease)

    def drain(self) -> None:
        self._connections.statement(
            lambda db: db.execute(
                "UPDATE cottention.replicas SET draining = true WHERE id = %s", [self._replica.id]
            )
        )

    def holder(self, session_id: str, owner: str) -> Holder | None:
        row = self._connections.statement(
            lambda db: db.execute(
                "SELECT s.lease_owner, s.lease_until > clock_timestamp(), r.url,"
                " coalesce(r.until > clock_timestamp(), false),"
                f" {queries.GOES_ON} FROM cottention.sessions AS s"
                " LEFT JOIN cottention.replicas AS r ON r.id = s.lease_owner"
                f" WHERE s.id = %s AND s.owner = %s AND {queries.IS_ALIVE}",
                [session_id, owner],
            ).fetchone()
        )
        if row is None:
            raise SessionNotFoundError(f"no session {session_id!r}")
        replica, is_leased, url, is_alive, goes_on = row
        if replica is None or not (goes_on or (is_leased and is_alive)):
            return None
        return Holder(url, replica == self._replica.id, is_leased and is_alive, goes_on)

    def urls(self) -> Sequence[str]:
        rows = self._connections.statement(
            lambda db: db.execute(
                "SELECT DISTINCT url FROM cottention.replicas"
                " WHERE until > clock_timestamp() AND id <> %s AND url IS NOT NULL",
                [self._replica.id],
            ).fetchall()
        )
        return [url for (url,) in rows]

    def lives(self, url: str) -> bool:
        statement = (
            "SELECT 1 FROM cottention.replicas WHERE url = %s AND until > clock_timestamp() LIMIT 1"
        )
        row = self._connections.statement(lambda db: db.execute(statement, [url]).fetchone())
        return row is not None

    def end(self, db: Db, lease: Lease) -> None:
        """Forget a turn that ends, in the transaction that ends it."""
        with self._lock:
            if lease not in self._leases:
                return
        gone = db.execute(
            "DELETE FROM cottention.turns WHERE session = %s AND fence = %s",
            [lease.session_id, lease.fence],
        )
        if gone.rowcount:  # by a statement of its own: it sees what the first has waited for
            db.execute("DELETE FROM cottention.chunks WHERE session = %s", [lease.session_id])

    def has(self, lease: Lease) -> bool:
        with self._lock:
            return lease in self._leases

    def forget(self, lease: Lease) -> None:
        """The turn has ended."""
        with self._lock:
            self._leases.discard(lease)
