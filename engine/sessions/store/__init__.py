"""The store of sessions: a protocol, and its implementation on SQLite and files."""

from cottention.engine.sessions.store.protocol import (
    BlobReader,
    Lease,
    NewSession,
    SessionRecord,
    SessionStore,
    StoreCounts,
)
from cottention.engine.sessions.store.sqlite_store import SqliteStore

__all__ = [
    "BlobReader",
    "Lease",
    "NewSession",
    "SessionRecord",
    "SessionStore",
    "SqliteStore",
    "StoreCounts",
]
