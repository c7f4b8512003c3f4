"""Where sessions are kept: a protocol, and its embedded implementation.

Owns the room's few public names. Does not know models, tensors or HTTP.
"""

from cottention.engine.sessions.store.protocol import (
    Lease,
    NewSession,
    SessionRecord,
    SessionStore,
    StoreCounts,
)
from cottention.engine.sessions.store.sqlite_store import SqliteStore

__all__ = ["Lease", "NewSession", "SessionRecord", "SessionStore", "SqliteStore", "StoreCounts"]
