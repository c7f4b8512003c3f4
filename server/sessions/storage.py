"""Where sessions are kept, from the server's start to its end.

Owns the folder: the user's own, or one that goes with the server; and how often sessions are tended
meanwhile. Everything heavy is imported inside. Knows no HTTP.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING

from cottention.engine.errors import ConfigurationError
from cottention.server.config import ServerConfig

if TYPE_CHECKING:
    from cottention.engine.engine import Engine
    from cottention.engine.sessions.manager import SessionManager

logger = logging.getLogger("cottention")

PREFIX = "cottention-sessions-"


@contextlib.contextmanager
def kept_sessions(engine: "Engine", config: ServerConfig) -> Iterator["SessionManager"]:
    """All sessions; closed at the end. Raises ConfigurationError."""
    from cottention.engine.sessions.maintenance import upkeep
    from cottention.engine.sessions.manager import LEASE_SECONDS, SessionManager
    from cottention.engine.sessions.store import SqliteStore

    with contextlib.ExitStack() as stack:
        is_durable = config.session_dir is not None
        folder = stack.enter_context(_temporary()) if not is_durable else _given(config)
        sessions = SessionManager(
            SqliteStore(Path(folder), durable=is_durable),
            engine.session_codec(),
            memory_bytes=config.session_memory,
            max_checkpoints=config.session_checkpoints,
            is_durable=is_durable,
        )
        stack.callback(sessions.close)
        stack.enter_context(upkeep(sessions.tend, LEASE_SECONDS / 3))
        yield sessions


def check_folder(config: ServerConfig) -> None:
    """Raise the ConfigurationError of a folder that cannot be, before a model is loaded in vain."""
    from cottention.engine.sessions.store import folder_lock

    if config.session_dir is not None:
        folder_lock.check_folder(Path(_given(config)))


def where_kept(config: ServerConfig) -> str:
    """For a person, at start-up."""
    if config.session_dir is None:
        return "kept until the server ends; --session-dir keeps them longer"
    return f"kept in {Path(config.session_dir).absolute()}"


def _temporary() -> TemporaryDirectory[str]:
    """A folder that goes with the server; those of servers that were killed go now."""
    from cottention.engine.sessions.store.folder_lock import remove_leftovers

    if removed := remove_leftovers(Path(gettempdir()), PREFIX):
        logger.info("removed the sessions of %d server(s) that were killed", len(removed))
    return TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)


def _given(config: ServerConfig) -> str:
    """The user's folder; what else may be wrong with it is the store's to say."""
    if not config.session_dir:
        raise ConfigurationError(
            "--session-dir must name a folder; it is empty: without the flag sessions are kept"
            " until the server ends"
        )
    return config.session_dir
