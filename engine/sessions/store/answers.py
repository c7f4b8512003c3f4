"""The SQL of idempotency keys and their answers, in the index.

Each function runs inside a transaction of its caller. now: the store's time.
"""

import sqlite3

from cottention.engine.errors import KeyReusedError, SessionMovedError
from cottention.engine.sessions.store.protocol import MAX_KEYS, Claim, Claimed

Db = sqlite3.Connection

SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    owner TEXT NOT NULL, key TEXT NOT NULL, request BLOB NOT NULL, token TEXT NOT NULL,
    expires_at REAL NOT NULL, answer BLOB, UNIQUE (owner, key));
CREATE INDEX IF NOT EXISTS answers_by_owner ON answers (owner, expires_at);
CREATE INDEX IF NOT EXISTS answers_by_expiry ON answers (expires_at);
"""
"""A table that releases of the same format version may lack: they go on without it."""


GOES_ON = (
    "EXISTS (SELECT 1 FROM turns AS j WHERE j.owner = answers.owner AND j.key = answers.key"
    " AND j.token = answers.token)"
)
"""A journaled turn makes the answer: its key is kept, whatever its time, until that has ended."""
IS_OVER = f"expires_at <= ? AND NOT {GOES_ON}"


def claim(db: Db, new: Claim, request: bytes, now: float, seconds: float) -> Claim | Claimed:
    """KeyReusedError. A key that has expired is as an unknown one."""
    db.execute(
        f"DELETE FROM answers WHERE owner = ? AND key = ? AND {IS_OVER}",
        [new.owner, new.key, now],
    )
    row = db.execute(
        "SELECT request, answer FROM answers WHERE owner = ? AND key = ?", [new.owner, new.key]
    ).fetchone()
    if row is not None:
        check_same(bytes(row[0]), request)
        return Claimed(row[1])
    db.execute(
        "INSERT INTO answers (owner, key, request, token, expires_at) VALUES (?, ?, ?, ?, ?)",
        [new.owner, new.key, request, new.token, now + seconds],
    )
    db.execute(
        "DELETE FROM answers WHERE rowid IN (SELECT rowid FROM answers WHERE owner = ?"
        " AND answer IS NOT NULL ORDER BY expires_at DESC LIMIT 1 OFFSET ?)",
        [new.owner, MAX_KEYS],
    )
    return new


def check_same(known: bytes, request: bytes) -> None:
    """KeyReusedError where the digests differ."""
    if known != request:
        raise KeyReusedError(
            "this Idempotency-Key was sent with another request: choose a new key for each request,"
            " and repeat a request with the same path and body"
        )


def keep(db: Db, held: Claim, answer: bytes) -> bool:
    """Whether the claim is still held."""
    cursor = db.execute(
        "UPDATE answers SET answer = ? WHERE owner = ? AND key = ? AND token = ?",
        [answer, held.owner, held.key, held.token],
    )
    return cursor.rowcount == 1


def require_kept(is_kept: bool) -> None:
    """SessionMovedError for an answer whose claim was lost: the transaction must not happen."""
    if not is_kept:
        raise SessionMovedError("the request of this Idempotency-Key was taken over")


def drop(db: Db, held: Claim) -> None:
    """Forget a claim without an answer."""
    db.execute(
        "DELETE FROM answers WHERE owner = ? AND key = ? AND token = ? AND answer IS NULL",
        [held.owner, held.key, held.token],
    )


def drop_unanswered(db: Db) -> None:
    """At a start: nobody makes these answers any more, but those of turns that go on."""
    db.execute(f"DELETE FROM answers WHERE answer IS NULL AND NOT {GOES_ON}")


def has_expired(db: Db, now: float) -> bool:
    """Whether there are keys to forget."""
    found = db.execute(f"SELECT 1 FROM answers WHERE {IS_OVER} LIMIT 1", [now]).fetchone()
    return found is not None


def expire(db: Db, now: float, limit: int) -> None:
    """Forget some of the keys that have expired."""
    db.execute(
        f"DELETE FROM answers WHERE rowid IN (SELECT rowid FROM answers WHERE {IS_OVER} LIMIT ?)",
        [now, limit],
    )
