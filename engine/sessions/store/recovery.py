"""What a store does when it is opened: what a crash or a bad disk left is put in order.

Owns the end of a dead owner's leases, the sessions set aside, and the sweep of files that nobody
refers to. Does not know how any of them came to be.
"""

import logging
import sqlite3

from cottention.engine.sessions.store.blobs import Blobs
from cottention.engine.sessions.store.database import Database

logger = logging.getLogger(__name__)

Db = sqlite3.Connection


def check_up(index: Database, blobs: Blobs) -> None:
    """Leases first, then states against the files there are, then the files nobody needs.

    Files are looked at by name and size alone: reading all would take as long as they are large.
    """
    sizes = blobs.sizes()
    index.write(end_leases)
    index.write(lambda db: put_in_order(db, sizes))
    known = index.read(lambda db: {digest for (digest,) in db.execute("SELECT digest FROM states")})
    orphans = sizes.keys() - known
    for digest in orphans:
        blobs.remove(digest)
    if orphans:
        logger.info("removed %d snapshots that belong to no session", len(orphans))


def end_leases(db: Db) -> None:
    """Whoever held them is dead, as the folder's lock proves: no time has to pass.

    A lease whose session has a new version did what it was for; any other turn was cut.
    """
    statement = (
        "UPDATE sessions SET was_interrupted = (was_interrupted OR version = lease_version),"
        " fence = fence + 1, lease_owner = NULL, lease_until = NULL, lease_version = NULL"
        " WHERE lease_owner IS NOT NULL RETURNING id, was_interrupted"
    )
    for session_id, was_interrupted in db.execute(statement).fetchall():
        if was_interrupted:
            logger.warning("session %s: its last turn was interrupted; as before it", session_id)


def put_in_order(db: Db, sizes: dict[str, int]) -> None:
    """Set aside the sessions whose head is missing or cut, and drop such checkpoints."""
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
                # older ones go with it: a rewind must not skip a turn
                db.execute("DELETE FROM states WHERE seq = ? AND n <= ?", [seq, n])
                logger.error("session %s lost checkpoints: %s %s", session_id, digest, reason)


def set_aside(db: Db, seq: int, reason: str) -> None:
    """Keep all that is known of a session, where no request finds it."""
    columns = "seq, id, owner, created, version, metadata, expires_at"
    statement = f"INSERT INTO set_aside SELECT {columns}, ? FROM sessions WHERE seq = ?"
    db.execute(statement, [reason, seq])
    db.execute("DELETE FROM sessions WHERE seq = ?", [seq])
