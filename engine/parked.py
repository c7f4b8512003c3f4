"""Values of sessions in memory: those used last, as many as fit into a budget of bytes.

Owns who makes room. Does not know what a session is called: values are known by the digest of their
bytes, so that forks share one.
"""

import threading
from collections import OrderedDict

from engine.session_state import SessionState

_VALUE_BYTES = 1024
"""What a value is counted for beside its rows: objects, ids and counts of a short session."""


class Parked:
    """May be called from any thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._values: OrderedDict[str, SessionState] = OrderedDict()
        self._lock = threading.Lock()
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, digest: str) -> bool:
        return digest in self._values

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self._nbytes

    def get(self, digest: str) -> SessionState | None:
        """A value, which is now the one used last."""
        with self._lock:
            if digest in self._values:
                self._values.move_to_end(digest)
            return self._values.get(digest)

    def put(self, digest: str, value: SessionState) -> None:
        """Keep a value; one that is there already stays. Those used least lately make room."""
        with self._lock:
            self._nbytes += 0 if digest in self._values else _size(value)
            self._values.setdefault(digest, value)
            self._values.move_to_end(digest)
            while self._nbytes > self._max_bytes:
                self._nbytes -= _size(self._values.popitem(last=False)[1])


def _size(value: SessionState) -> int:
    num_ids = len(value.pending) + len(value.recent) + 2 * len(value.counts)
    return value.nbytes + 8 * num_ids + _VALUE_BYTES
