"""Where sessions are kept, from the server's start to its end.

Owns the folder: the user's own, or one that goes with the server; and how often sessions are tended
meanwhile. Everything heavy is imported
inside. Knows no HTTP.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from engine.errors import ConfigurationError
from server.settings import ServerConfig

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.sessions import Sessions


@contextlib.contextmanager
def kept_sessions(engine: "Engine", config: ServerConfig) -> Iterator["Sessions"]:
    """All sessions; closed at the end. Raises ConfigurationError."""
    from engine.sessions import LEASE_SECONDS, Sessions
    from engine.store import SqliteStore
    from engine.upkeep import upkeep

    with contextlib.ExitStack() as stack:
        is_durable = config.session_dir is not None
        folder = _folder(config.session_dir or stack.enter_context(_temporary()))
        sessions = Sessions(
            SqliteStore(folder, durable=is_durable),
            engine.session_codec(),
            memory_bytes=config.session_memory,
            max_checkpoints=config.session_checkpoints,
            is_durable=is_durable,
        )
        stack.callback(sessions.close)
        stack.enter_context(upkeep(sessions.tend, LEASE_SECONDS / 3))
        yield sessions


def where_kept(config: ServerConfig) -> str:
    """For a person, at start-up."""
    if config.session_dir is None:
        return "kept until the server ends; --session-dir keeps them longer"
    return f"kept in {Path(config.session_dir).absolute()}"


def _temporary() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="cottention-sessions-", ignore_cleanup_errors=True)


def _folder(path: str) -> Path:
    try:
        Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--session-dir {path} cannot be used: {error}") from None
    return Path(path)
