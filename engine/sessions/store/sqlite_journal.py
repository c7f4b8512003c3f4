"""`SqliteJournal`: turns that go on without their client, in the index of a folder.

They go on at the next start of a server of the same model. A row of `turns` counts under the fence
of its session's lease alone, as in PostgreSQL.
"""

import sqlite3
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cottention.engine.errors import SessionMovedError, SessionNotFoundError
from cottention.engine.sessions.store import queries
from cottention.engine.sessions.store.database import Database
from cottention.engine.sessions.store.faults import StoreFaults
from cottention.engine.sessions.store.journal import (
    MAX_TRIES,
    Adopted,
    Chunk,
    Holder,
    JournaledTurn,
    SessionJournal,
)
from cottention.engine.sessions.store.protocol import Lease, SessionRecord

Db = sqlite3.Connection

COLUMNS = "owner, turn, name, path, body, seed, created, deadline, key, token"
"""The fields of a JournaledTurn."""
HAS_GONE_ON = (
    "EXISTS (SELECT 1 FROM chunks AS c WHERE c.session = turns.session AND c.fence = turns.fence)"
)
IS_WAITING = (
    "EXISTS (SELECT 1 FROM sessions AS s WHERE s.id = turns.session AND s.fence = turns.fence"
    " AND s.lease_until IS NULL)"
)


class SqliteJournal(SessionJournal):
    """See SessionJournal. The folder's only server never counts as dead while it runs.

    A kill loses nothing of what this has stored; a loss of power may lose the last of it: parts,
    which are computed again, and turns, which are undone.
    """

    life = 1
    is_steady = True

    def __init__(
        self,
        index: Database,
        faults: StoreFaults,
        holder: str,
        model: str,
        monotonic: Callable[[], float],
    ) -> None:
        """holder: whose leases this server's are. monotonic: the clock of leases."""
        self._index = index
        self._faults = faults
        self._holder = holder
        self._model = model
        self._monotonic = monotonic
        self._leases: set[Lease] = set()
        self._lock = threading.Lock()

    def begin(self, lease: Lease, turn: JournaledTurn) -> None:
        def change(db: Db) -> None:
            if not _is_held(db, lease):
                raise SessionMovedError(f"session {lease.session_id!r} was taken over")
            db.execute("DELETE FROM chunks WHERE session = ?", [lease.session_id])
            db.execute(
                f"INSERT OR REPLACE INTO turns (session, fence, model, {COLUMNS})"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    *(lease.session_id, lease.fence, self._model),
                    *(getattr(turn, name) for name in COLUMNS.split(", ")),
                ],
            )

        with self._faults.writing():
            self._index.write_relaxed(change)
        with self._lock:
            self._leases.add(lease)

    def has(self, lease: Lease) -> bool:
        with self._lock:
            return lease in self._leases

    def append(self, chunks: Iterable[Chunk]) -> set[Lease]:
        new = [*chunks]

        def change(db: Db) -> set[Lease]:
            held = set()
            for each in new:
                raw = struct.pack(f"<{len(each.ids)}i", *each.ids)
                done = db.execute(
                    "INSERT OR REPLACE INTO chunks SELECT session, fence, ?, ?, ? FROM turns"
                    " WHERE session = ? AND fence = ?",
                    [each.n, raw, each.events, each.lease.session_id, each.lease.fence],
                )
                if done.rowcount:
                    held.add(each.lease)
            return held

        with self._faults.writing():
            return self._index.write_relaxed(change)

    def holds(self, lease: Lease) -> bool:
        with self._faults.reading():
            return self._index.read(lambda db: _is_held(db, lease))

    def waiting(self) -> Sequence[str]:
        find = f"SELECT session FROM turns WHERE model = ? AND {IS_WAITING}"

        def read(db: Db) -> list[str]:
            return [session for (session,) in db.execute(find, [self._model])]

        with self._faults.reading():
            return self._index.read(read)

    def adopt(self, session_id: str, ttl_seconds: float) -> Adopted | None:
        """None also where it has been tried too often: then the turn is undone."""
        values = {"id": session_id, "model": self._model, "holder": self._holder}

        def change(db: Db) -> Adopted | None:
            where = f"session = :id AND model = :model AND {IS_WAITING}"
            tried = db.execute(f"SELECT tries, {HAS_GONE_ON} FROM turns WHERE {where}", values)
            row = tried.fetchone()
            if row is None:
                return None
            tries, has_gone_on = row
            if tries >= MAX_TRIES and not has_gone_on:
                db.execute("UPDATE sessions SET was_interrupted = 1 WHERE id = ?", [session_id])
                _forget(db, session_id)
                return None
            [fence, seq] = db.execute(
                "UPDATE sessions SET fence = fence + 1, lease_owner = :holder,"
                " lease_until = :until, lease_version = version WHERE id = :id"
                " RETURNING fence, seq",
                {**values, "until": self._monotonic() + ttl_seconds},
            ).fetchone()
            db.execute(
                "UPDATE turns SET fence = ?, tries = ? WHERE session = ?",
                [fence, 1 if has_gone_on else tries + 1, session_id],
            )
            record = queries.read_session(db, seq)
            return _adopted(db, Lease(session_id, fence, record.version), record)

        with self._faults.writing():
            adopted = self._index.write(change)
        if adopted is not None:
            with self._lock:
                self._leases.add(adopted.lease)
        return adopted

    def hand_over(self, lease: Lease, *, has_failed: bool = False) -> None:
        """To the next start, or to this server where it still takes turns."""

        def change(db: Db) -> None:
            if not has_failed:
                db.execute(
                    "UPDATE turns SET tries = 0 WHERE session = ? AND fence = ?",
                    [lease.session_id, lease.fence],
                )
            queries.release_lease(db, lease)

        with self._faults.writing():
            self._index.write(change)
        self.forget(lease)

    def drain(self) -> None:
        """There is nobody to tell."""

    def holder(self, session_id: str, owner: str) -> Holder | None:
        def read(db: Db) -> Any:
            return db.execute(
                f"SELECT lease_until IS NOT NULL, {queries.GOES_ON} FROM sessions"
                " WHERE id = ? AND owner = ?",
                [session_id, owner],
            ).fetchone()

        with self._faults.reading():
            row = self._index.read(read)
        if row is None:
            raise SessionNotFoundError(f"no session {session_id!r}")
        is_leased, goes_on = map(bool, row)
        if not (is_leased or goes_on):
            return None
        return Holder(None, is_mine=True, is_alive=is_leased, goes_on=goes_on)

    def urls(self) -> Sequence[str]:
        """There are no others."""
        return ()

    def lives(self, url: str) -> bool:  # noqa: ARG002
        return False

    def end(self, db: Db, lease: Lease) -> None:
        """Forget a turn that ends, in the transaction that ends it."""
        if self.has(lease):
            _forget(db, lease.session_id)

    def forget(self, lease: Lease) -> None:
        """The turn has ended."""
        with self._lock:
            self._leases.discard(lease)


def _adopted(db: Db, lease: Lease, record: SessionRecord) -> Adopted:
    session = [lease.session_id]
    values = db.execute(f"SELECT {COLUMNS} FROM turns WHERE session = ?", session).fetchone()
    chunks = db.execute(
        "SELECT ids, events FROM chunks WHERE session = ? ORDER BY fence, n", session
    ).fetchall()
    raw = b"".join(ids for ids, _ in chunks)
    ids = struct.unpack(f"<{len(raw) // 4}i", raw)
    return Adopted(lease, record, JournaledTurn(*values), ids, b"".join(each for _, each in chunks))


def _forget(db: Db, session_id: str) -> None:
    db.execute("DELETE FROM turns WHERE session = ?", [session_id])
    db.execute("DELETE FROM chunks WHERE session = ?", [session_id])


def _is_held(db: Db, lease: Lease) -> bool:
    statement = f"SELECT 1 FROM sessions WHERE {queries.IS_HELD}"
    values = {"id": lease.session_id, "fence": lease.fence}
    return db.execute(statement, values).fetchone() is not None
