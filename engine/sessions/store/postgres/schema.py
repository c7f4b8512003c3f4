"""The tables of the store, and how an older database gets what is new.

A migration only adds: servers of the release before it go on beside those that run it, so that
replicas can be replaced one by one. A database that has more than this release knows is used as it
is.
"""

from typing import TYPE_CHECKING, Any

from cottention.engine.sessions.store.postgres.functions import ACQUIRE, COMMIT

if TYPE_CHECKING:
    from psycopg import Connection

# replicas: the servers that use the database; one lives while `until` is to come.
# sessions: a lease names a replica, and is valid while that lives and until `lease_until`. nbytes:
# of metadata and states. expires_at: unix seconds. states: of `blobs.State`, the head last; what
# the list is at a version never changes. turns: names of the transactions that made the last
# versions, the newest first, for commits in doubt. No column that a turn changes is in an index, so
# that rows are updated in place (HOT) where pages have room.
# blobs: a snapshot and its event log, and what a state says of it; refs: states that have it. What
# a digest names never changes; a blob may take the row of one that goes. bytes: deflated where they
# are shorter than nbytes; PostgreSQL need not try it again.
# budgets: what is left of an owner's tokens of a minute, refilled since `filled_at`; lent: by the
# last loan. key_use: requests of an owner that a replica runs.
_FIRST = f"""
CREATE TABLE cottention.replicas (
    id text PRIMARY KEY, name text NOT NULL, url text, build text NOT NULL, model text NOT NULL,
    until timestamptz NOT NULL, draining boolean NOT NULL DEFAULT false);
CREATE TABLE cottention.sessions (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, id text NOT NULL UNIQUE,
    owner text NOT NULL, created bigint NOT NULL, version bigint NOT NULL DEFAULT 1,
    nbytes bigint NOT NULL, metadata text NOT NULL, states json NOT NULL,
    expires_at double precision, was_interrupted boolean NOT NULL DEFAULT false,
    fence bigint NOT NULL DEFAULT 0, lease_owner text, lease_turn bigint, lease_until timestamptz,
    lease_version bigint, turns bigint[] NOT NULL DEFAULT '{{}}') WITH (fillfactor = 70);
CREATE INDEX sessions_by_owner ON cottention.sessions (owner, seq);
CREATE INDEX sessions_by_expiry ON cottention.sessions (expires_at) WHERE expires_at IS NOT NULL;
CREATE TABLE cottention.blobs (
    digest bytea PRIMARY KEY, refs bigint NOT NULL, position bigint NOT NULL,
    nbytes bigint NOT NULL, context_policy text NOT NULL, events_nbytes bigint NOT NULL,
    bytes bytea NOT NULL);
ALTER TABLE cottention.blobs ALTER bytes SET STORAGE EXTERNAL;
CREATE UNLOGGED TABLE cottention.budgets (
    owner text PRIMARY KEY, tokens double precision NOT NULL, lent double precision NOT NULL,
    filled_at timestamptz NOT NULL);
CREATE UNLOGGED TABLE cottention.key_use (
    owner text NOT NULL, replica text NOT NULL REFERENCES cottention.replicas ON DELETE CASCADE,
    running bigint NOT NULL, PRIMARY KEY (owner, replica));
{ACQUIRE}
{COMMIT}
"""

# answers: idempotency keys, with the digests of their requests and, once there are any, their
# answers. turns: those that go on without their client and without their replica, each under the
# fence of the lease that runs it; others are left over. chunks: their journal, in the order of
# (fence, n): ids, int32 each, and the events that tell them.
_GOING_ON = """
CREATE TABLE cottention.answers (
    owner text NOT NULL, key text NOT NULL, request bytea NOT NULL, token text NOT NULL,
    replica text NOT NULL, until timestamptz NOT NULL, answer bytea, PRIMARY KEY (owner, key));
CREATE INDEX answers_by_owner ON cottention.answers (owner, until);
CREATE INDEX answers_by_expiry ON cottention.answers (until);
CREATE TABLE cottention.turns (
    session text PRIMARY KEY, fence bigint NOT NULL, owner text NOT NULL, turn text NOT NULL,
    name text NOT NULL, path text NOT NULL, body bytea NOT NULL, model text NOT NULL,
    seed bigint NOT NULL, created bigint NOT NULL, deadline double precision, key text, token text,
    tries integer NOT NULL DEFAULT 0);
CREATE TABLE cottention.chunks (
    session text NOT NULL, fence bigint NOT NULL, n bigint NOT NULL, ids bytea NOT NULL,
    events bytea NOT NULL, PRIMARY KEY (session, fence, n));
"""

MIGRATIONS = (_FIRST, _GOING_ON)
"""In order; the first one makes the tables of an empty database."""

LOCK_KEY = 0x636F7474
"""Of the advisory lock under which one replica at a time migrates."""


def migrate(db: "Connection[Any]") -> None:
    """Bring the database up to date, inside a transaction of the caller."""
    db.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK_KEY])
    db.execute("CREATE SCHEMA IF NOT EXISTS cottention")
    db.execute(
        "CREATE TABLE IF NOT EXISTS cottention.migrations"
        " (version integer PRIMARY KEY, applied timestamptz NOT NULL DEFAULT clock_timestamp())"
    )
    rows = db.execute("SELECT coalesce(max(version), 0) FROM cottention.migrations").fetchall()
    [[applied]] = rows
    for version, statements in enumerate(MIGRATIONS[applied:], applied + 1):
        db.execute(statements)
        db.execute("INSERT INTO cottention.migrations (version) VALUES (%s)", [version])
