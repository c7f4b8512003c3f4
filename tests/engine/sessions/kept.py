"""Sessions over a real store with states that have no rows, so that no model is needed."""

from pathlib import Path
from typing import Any

from cottention.engine.sessions.fingerprint import Fingerprint
from cottention.engine.sessions.manager import Session, SessionManager
from cottention.engine.sessions.snapshot import SnapshotCodec
from cottention.engine.sessions.store import SqliteStore
from cottention.engine.state.context_window import context_schedules
from cottention.engine.state.session_state import SessionState
from cottention.engine.state.spec import StateSpec, recurrence_tensors

OWNER, WINDOW = "a", 512


def kept(folder: Path, **clocks: Any) -> SessionManager:
    """The sessions of a folder. clocks: as SqliteStore takes them."""
    spec = StateSpec(recurrence_tensors(layers=1, heads=1, value_width=8, key_width=8))
    prints = Fingerprint("w", "t", "c", "l")
    return SessionManager(
        SqliteStore(folder, durable=False, **clocks),  # fewer waits for the disk
        SnapshotCodec(prints, spec, 256, context_schedules(WINDOW), WINDOW),
        memory_bytes=1 << 20,
        max_checkpoints=4,
        is_durable=True,
    )


def new(sessions: SessionManager, text: bytes = b"abc", ttl: float | None = None) -> str:
    """The id of a new session that holds a text."""
    return sessions.open(OWNER, SessionState().extended(text, (), WINDOW), {}, ttl).id


def turn(sessions: SessionManager, session_id: str, text: bytes = b"x") -> Session:
    """The session after a turn that added a text."""
    begun = sessions.begin(OWNER, session_id)
    return sessions.commit(begun, begun.state.extended(text, (), WINDOW))


def text_of(sessions: SessionManager, session_id: str) -> bytes:
    """What a session holds, by a turn that comes to nothing."""
    begun = sessions.begin(OWNER, session_id)
    sessions.abandon(begun)
    return bytes(begun.state.recent)
