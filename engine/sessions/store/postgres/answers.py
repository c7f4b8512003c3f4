"""The SQL of idempotency keys and their answers.

Each function runs inside a transaction of its caller. A claim holds while the replica that made it
lives, or has a turn that another replica goes on with (`journal`).
"""

from typing import Any

import psycopg

from cottention.engine.sessions.store.answers import check_same
from cottention.engine.sessions.store.protocol import MAX_KEYS, Claim, Claimed

Db = psycopg.Connection[Any]

GOES_ON = (
    "EXISTS (SELECT FROM cottention.turns AS j"
    " JOIN cottention.sessions AS s ON s.id = j.session AND s.fence = j.fence"
    " WHERE j.owner = a.owner AND j.key = a.key AND j.token = a.token)"
)
"""A journaled turn makes the answer: its key is kept, whatever its time, until that has ended."""
IS_OVER = (
    f"(a.until <= clock_timestamp() AND NOT {GOES_ON} OR a.token = excluded.token"
    " OR a.answer IS NULL AND a.request = excluded.request"
    " AND NOT EXISTS (SELECT FROM cottention.replicas AS r"
    "  WHERE r.id = a.replica AND r.until > clock_timestamp())"
    f" AND NOT {GOES_ON})"
)


def claim(db: Db, new: Claim, request: bytes, replica: str, seconds: float) -> Claim | Claimed:
    """KeyReusedError. May be repeated: the same token claims the key again."""
    made = db.execute(
        "INSERT INTO cottention.answers AS a (owner, key, request, token, replica, until)"
        " VALUES (%s, %s, %s, %s, %s, clock_timestamp() + make_interval(secs => %s))"
        " ON CONFLICT (owner, key) DO UPDATE SET request = excluded.request,"
        " token = excluded.token, replica = excluded.replica, until = excluded.until,"
        f" answer = NULL WHERE {IS_OVER} RETURNING 1",
        [new.owner, new.key, request, new.token, replica, seconds],
    ).fetchone()
    if made is not None:
        db.execute(
            "DELETE FROM cottention.answers AS a WHERE a.owner = %s AND a.key = ("
            "  SELECT o.key FROM cottention.answers AS o WHERE o.owner = %s"
            "  AND o.answer IS NOT NULL ORDER BY o.until DESC LIMIT 1 OFFSET %s)",
            [new.owner, new.owner, MAX_KEYS],
        )
        return new
    row = db.execute(
        "SELECT a.request, a.answer, a.replica, r.url,"
        " coalesce(r.until > clock_timestamp(), false) FROM cottention.answers AS a"
        " LEFT JOIN cottention.replicas AS r ON r.id = a.replica WHERE a.owner = %s AND a.key = %s",
        [new.owner, new.key],
    ).fetchone()
    if row is None:  # it was dropped between the two statements
        return claim(db, new, request, replica, seconds)
    known, answer, holder, url, is_alive = row
    check_same(bytes(known), request)
    return Claimed(None if answer is None else bytes(answer), url, holder == replica, is_alive)


def keep(db: Db, held: Claim, answer: bytes) -> bool:
    """Whether the claim is still held."""
    cursor = db.execute(
        "UPDATE cottention.answers SET answer = %s WHERE owner = %s AND key = %s AND token = %s",
        [answer, held.owner, held.key, held.token],
    )
    return cursor.rowcount == 1


def drop(db: Db, held: Claim) -> None:
    """Forget a claim without an answer."""
    db.execute(
        "DELETE FROM cottention.answers"
        " WHERE owner = %s AND key = %s AND token = %s AND answer IS NULL",
        [held.owner, held.key, held.token],
    )


def expire(db: Db, limit: int) -> None:
    """Forget some of the keys that have expired."""
    db.execute(
        "DELETE FROM cottention.answers WHERE (owner, key) IN (SELECT a.owner, a.key"
        f" FROM cottention.answers AS a WHERE a.until <= clock_timestamp() AND NOT {GOES_ON}"
        " LIMIT %s FOR UPDATE OF a SKIP LOCKED)",
        [limit],
    )
