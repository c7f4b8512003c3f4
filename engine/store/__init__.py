"""Where sessions are kept: a protocol, and its embedded implementation.

Owns the room's few public names. Does not know models, tensors or HTTP.
"""

from cottention.engine.store.protocol import Lease, NewSession, Record, SessionStore, StoreCounts
from cottention.engine.store.sqlite_store import SqliteStore

__all__ = ["Lease", "NewSession", "Record", "SessionStore", "SqliteStore", "StoreCounts"]
