"""What the owner of a session may see of it, without changing anything.

Owns that another owner sees nothing, and that what is read is whole while turns end meanwhile. Does
not know turns.
"""

from collections.abc import Callable
from typing import TypeVar

from cottention.engine.errors import SessionNotFoundError, SnapshotError
from cottention.engine.holdings import Holdings
from cottention.engine.outbox import Outbox
from cottention.engine.session import Exported, Session, SessionCounts
from cottention.engine.store import Record, SessionStore

Found = TypeVar("Found")


class SessionViews:
    """The sessions of a store, wherever they are. Thread-safe; calls wait for the disk."""

    def __init__(self, store: SessionStore, holdings: Holdings) -> None:
        self._store = store
        self._holdings = holdings

    def find(self, owner: str, session_id: str) -> Session:
        """SessionNotFoundError also where it is somebody else's."""
        return self._holdings.told(self._record(owner, session_id))

    def page(self, owner: str, after: str | None, limit: int) -> tuple[list[Session], bool]:
        """The owner's sessions behind `after`, newest first; whether there are more."""
        records, has_more = self._store.list(owner, after, limit)
        return [self._holdings.told(record) for record in records], has_more

    def export(self, owner: str, session_id: str) -> Exported:
        """It as it was after its last turn, and its bytes. SnapshotError: it is damaged."""
        return self._of_head(owner, session_id, self._holdings.exported)

    def outbox(self, owner: str, session_id: str) -> Outbox:
        """What its last turn told, where that was kept. SnapshotError: it is damaged."""
        return self._of_head(owner, session_id, lambda record: self._holdings.load(record).outbox)

    def sizes(self) -> SessionCounts:
        """How many there are of each residence, and their bytes."""
        return self._holdings.sizes()

    def _of_head(self, owner: str, session_id: str, read: Callable[[Record], Found]) -> Found:
        record = self._record(owner, session_id)
        try:
            return read(record)
        except SnapshotError:
            if self._store.head(session_id) == record.version:
                raise
        return self._of_head(owner, session_id, read)  # a turn ended, and that head is gone

    def _record(self, owner: str, session_id: str) -> Record:
        try:
            record = self._store.record(session_id)
        except SessionNotFoundError:  # expired, it may still have something in memory
            self._holdings.forget(session_id)
            raise
        if record.owner != owner:
            raise SessionNotFoundError(f"no session {session_id!r}")
        return record
