"""How a session's value gets to the store, and which older ones stay beside it.

Owns that a rewind never skips a turn: where a value was not kept, those before it go. Does not know
who may change a session.
"""

from contextlib import suppress

from cottention.engine.ahead import Ahead
from cottention.engine.holdings import Holdings
from cottention.engine.losses import save_all
from cottention.engine.session_state import SessionState
from cottention.engine.snapshot import SnapshotCodec
from cottention.engine.store import Lease, NewSession, Record, SessionStore


class Saving:
    """Puts values into the store, and into memory once they are there."""

    def __init__(
        self, store: SessionStore, codec: SnapshotCodec, holdings: Holdings, max_checkpoints: int
    ) -> None:
        self._store = store
        self._codec = codec
        self._holdings = holdings
        self._max_checkpoints = max_checkpoints

    def save(self, lease: Lease, state: SessionState) -> Record:
        """A turn's outcome, after that of an earlier turn for which there was no room.

        StoreFullError: not all of it is stored; SessionMovedError.
        """
        version, before = lease.version, self._holdings.ahead(lease.session_id)
        if before is not None:
            version = self._put(lease, version, before).version
        return self._put(lease, version, Ahead(state, 1))

    def twin(self, record: Record, state: SessionState) -> NewSession:
        """Another session of the same value and the same past, to be made."""
        ahead = self._holdings.ahead(record.id)
        return NewSession(
            record.owner,
            state.num_tokens,
            snapshot=self._codec.encode(state) if ahead else None,
            head=None if ahead else record.head,
            checkpoints=ahead.checkpoints(record) if ahead else record.checkpoints,
            metadata=record.metadata,
            expires_at=record.expires_at,
            context_policy=state.context_policy,
        )

    def save_rest(self, lease_seconds: float) -> None:
        """Try once more what there was no room for, as the last thing that is done."""

        def save(session_id: str, ahead: Ahead) -> None:
            lease = self._holdings.start(session_id, lease_seconds)
            self._put(lease, lease.version, ahead)

        if found := self._holdings.all_ahead():
            with suppress(Exception):  # then there is as much room as there was
                self._store.free_room()
            save_all(found, save)

    def _put(self, lease: Lease, version: int, ahead: Ahead) -> Record:
        state, num_turns = ahead
        new = self._codec.encode(state), state.num_tokens
        num_checkpoints = self._max_checkpoints if num_turns == 1 else 0
        record = self._store.put(lease, version, *new, num_checkpoints, state.context_policy)
        self._holdings.park(record, state)
        return record
