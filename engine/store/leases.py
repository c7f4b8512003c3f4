"""The right to change a session: leases, their fences, and the compare-and-set under them.

Owns the SQL of who may write. Does not know transactions, files or what is written.
"""

from cottention.engine.errors import SessionBusyError, SessionMovedError
from cottention.engine.store import rows
from cottention.engine.store.protocol import Lease

IS_HELD = "id = :id AND fence = :fence AND lease_until IS NOT NULL"


def give(db: rows.Db, session_id: str, owner: str, until: float, now: float) -> Lease:
    """The next fence; SessionBusyError while the last one is held and not past its time."""
    seq = rows.seq_of(db, session_id, now)
    row = db.execute(
        "UPDATE sessions SET fence = fence + 1, lease_owner = :owner, lease_until = :until,"
        f" lease_version = version WHERE seq = :seq AND {rows.IS_FREE} RETURNING fence, version",
        {"seq": seq, "owner": owner, "until": until, "now": now},
    ).fetchone()
    if row is None:
        raise SessionBusyError(f"another turn has session {session_id!r}")
    return Lease(session_id, *row)


def prolong(db: rows.Db, held: Lease, until: float) -> None:
    """SessionMovedError where it is held no more."""
    cursor = db.execute(
        f"UPDATE sessions SET lease_until = :until WHERE {IS_HELD}",
        {"id": held.session_id, "fence": held.fence, "until": until},
    )
    if cursor.rowcount == 0:
        raise SessionMovedError(f"session {held.session_id!r} is no longer held by this turn")


def end(db: rows.Db, held: Lease) -> None:
    """Nothing happens where it is held no more."""
    db.execute(
        "UPDATE sessions SET lease_owner = NULL, lease_until = NULL, lease_version = NULL"
        f" WHERE {IS_HELD}",
        {"id": held.session_id, "fence": held.fence},
    )


def advance(db: rows.Db, held: Lease, expected_version: int) -> int:
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
