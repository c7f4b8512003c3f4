"""Values that the store had no room for, and how far ahead of it they are.

Owns that a rewind never skips a turn: of what is ahead only the newest value is kept. Does not know
disks or leases, and is not safe to share between threads: who owns it locks.
"""

from typing import NamedTuple

from cottention.engine.errors import NothingToRewindError
from cottention.engine.session_state import SessionState
from cottention.engine.store import Record


class Ahead(NamedTuple):
    """A session's value after `num_turns` more turns than the store's."""

    state: SessionState
    num_turns: int

    def checkpoints(self, record: Record) -> tuple[str, ...]:
        """Digests of what it can be rewound to, the newest last."""
        return (*record.checkpoints, record.head) if self.num_turns == 1 else ()


class AheadOfStore:
    """The newest value of each session that the store does not have."""

    def __init__(self) -> None:
        self._found: dict[str, Ahead] = {}

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._found

    def __len__(self) -> int:
        return len(self._found)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows of all."""
        return sum(ahead.state.nbytes for ahead in self._found.values())

    def get(self, session_id: str) -> Ahead | None:
        """Of this session; None where the store has its value."""
        return self._found.get(session_id)

    def all(self) -> dict[str, Ahead]:
        """Of all sessions, by id."""
        return dict(self._found)

    def move(self, session_id: str, state: SessionState) -> None:
        """The value after one more turn, in place of the one before it."""
        before = self._found.get(session_id)
        self._found[session_id] = Ahead(state, 1 + (before.num_turns if before else 0))

    def rewind(self, session_id: str) -> bool:
        """Go back to what the store has; whether there was something newer.

        NothingToRewindError: the store's is more than a turn older.
        """
        ahead = self._found.get(session_id)
        if ahead is not None and ahead.num_turns > 1:
            raise NothingToRewindError(
                "the session as it was before its last turn is not kept: the disk was full"
            )
        return self.forget(session_id)

    def forget(self, session_id: str) -> bool:
        """The store has it, or the session is gone; whether there was something."""
        return self._found.pop(session_id, None) is not None
