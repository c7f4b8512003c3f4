"""Where the value of a session is found: in memory, in a store, or nowhere else yet.

Owns values that a full disk did not take, and what stays in memory beside the store. Does not know
turns, nor who may see a session.
"""

from engine.parked import Parked
from engine.session_state import SessionState
from engine.snapshot import SnapshotCodec
from engine.store import NewSession, Record, SessionStore


class SessionValues:
    """May be called from any thread; one session's by whoever holds its lease."""

    def __init__(self, store: SessionStore, codec: SnapshotCodec, memory_bytes: int) -> None:
        self._store = store
        self._codec = codec
        self._unstored: dict[str, SessionState] = {}
        self.parked = Parked(memory_bytes)

    def of(self, record: Record) -> SessionState:
        """The value of a session. Raises SnapshotError where its bytes are damaged."""
        state = self._unstored.get(record.id) or self.parked.get(record.head)
        if state is None:
            state = self._codec.decode(self._store.get(record.head))
            self.parked.put(record.head, state)
        return state

    def raw(self, record: Record) -> bytes:
        """The value's bytes. Raises SnapshotError."""
        kept = self._unstored.get(record.id)
        return self._store.get(record.head) if kept is None else self._codec.encode(kept)

    def took(self, record: Record, state: SessionState) -> None:
        """The store has the value of a session now."""
        self.parked.put(record.head, state)
        self._unstored.pop(record.id, None)

    def hold(self, session_id: str, state: SessionState) -> None:
        """The store has not taken this value: it stays in memory, whatever the budget."""
        self._unstored[session_id] = state

    def drop(self, session_id: str) -> bool:
        """Forget a value that the store has not; whether there was one."""
        return self._unstored.pop(session_id, None) is not None

    def twin(self, record: Record) -> NewSession:
        """Another session of the same value and the same past."""
        is_stored = self.is_stored(record)
        return NewSession(
            record.owner,
            self.position(record),
            snapshot=None if is_stored else self.raw(record),
            head=record.head if is_stored else None,
            checkpoints=record.checkpoints,
            metadata=record.metadata,
            expires_at=record.expires_at,
        )

    def is_stored(self, record: Record) -> bool:
        """Whether the store has the session's value."""
        return record.id not in self._unstored

    def is_in_memory(self, record: Record) -> bool:
        """Whether a turn need not read the store."""
        return record.id in self._unstored or record.head in self.parked

    def position(self, record: Record) -> int:
        """Tokens that the session holds."""
        kept = self._unstored.get(record.id)
        return record.position if kept is None else kept.num_tokens
