"""Recovery when a store is opened: what a crash or a bad disk left is repaired.

The leases of the dead process end, sessions without their blob are set aside, and blobs that no
session refers to are removed.
"""

import logging
import sqlite3

from cottention.engine.sessions.store import queries
from cottention.engine.sessions.store.blobs import Blobs
from cottention.engine.sessions.store.database import Database

logger = logging.getLogger(__name__)

Db = sqlite3.Connection


def recover(index: Database, blobs: Blobs) -> None:
    """End leases, then compare states with the blobs, then remove unreferenced blobs.

    Blobs are checked by name and size alone: reading all of them could take minutes.
    """
    sizes = blobs.sizes()
    index.write(end_leases)
    index.write(lambda db: check_states(db, sizes))
    known = index.read(lambda db: {digest for (digest,) in db.execute("SELECT digest FROM states")})
    orphans = sizes.keys() - known
    for digest in orphans:
        blobs.remove(digest)
    if orphans:
        logger.info("removed %d snapshots that belong to no session", len(orphans))


def end_leases(db: Db) -> None:
    """End all leases at once: the folder's lock proves that their holders are dead.

    Where the session still has the version of its lease, the turn was interrupted, unless it is
    journaled: then it waits to go on.
    """
    goes_on = f"lease_owner IS NOT NULL AND {queries.GOES_ON}"
    db.execute(f"UPDATE sessions SET {queries.NO_LEASE} WHERE {goes_on}")
    db.execute(
        "DELETE FROM turns WHERE NOT EXISTS (SELECT 1 FROM sessions AS s"
        " WHERE s.id = turns.session AND s.fence = turns.fence)"
    )
    db.execute("DELETE FROM chunks WHERE session NOT IN (SELECT session FROM turns)")
    statement = (
        "UPDATE sessions SET was_interrupted = (was_interrupted OR version = lease_version),"
        " fence = fence + 1, lease_owner = NULL, lease_until = NULL, lease_version = NULL"
        " WHERE lease_owner IS NOT NULL RETURNING id, was_interrupted"
    )
    for session_id, was_interrupted in db.execute(statement).fetchall():
        if was_interrupted:
            logger.warning("session %s: its last turn was interrupted, and is undone", session_id)


def check_states(db: Db, sizes: dict[str, int]) -> None:
    """Set aside the sessions whose head is missing or cut, and delete such checkpoints."""
    states = db.execute("SELECT DISTINCT digest, nbytes FROM states")
    for digest, nbytes in [row for row in states if sizes.get(row[0]) != row[1]]:
        size = sizes.get(digest)
        reason = "is missing" if size is None else f"has {size} bytes of {nbytes}"
        bad = db.execute(
            "SELECT seq, id, n, n = (SELECT max(n) FROM states WHERE seq = s.seq)"
            " FROM states AS s JOIN sessions USING (seq) WHERE digest = ?",
            [digest],
        )
        for seq, session_id, n, is_head in bad.fetchall():
            if is_head:
                set_aside(db, seq, f"snapshot {digest} {reason}")
                logger.error("session %s set aside: snapshot %s %s", session_id, digest, reason)
            else:
                # and the older ones: a rewind must not skip a turn
                db.execute("DELETE FROM states WHERE seq = ? AND n <= ?", [seq, n])
                logger.error("session %s lost checkpoints: %s %s", session_id, digest, reason)


def set_aside(db: Db, seq: int, reason: str) -> None:
    """Move a session's row to where no request finds it, with the reason."""
    statement = (
        "INSERT INTO set_aside SELECT seq, id, owner, created, version,"
        " (SELECT text FROM metadata WHERE key = metadata_key), expires_at, ?"
        " FROM sessions WHERE seq = ?"
    )
    db.execute(statement, [reason, seq])
    db.execute("DELETE FROM sessions WHERE seq = ?", [seq])
