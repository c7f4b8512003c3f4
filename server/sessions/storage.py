"""Opens the session store for the time that the server runs, and starts its maintenance.

The folder is that of --session-dir, or a temporary one that is removed with the server. Modules
that load torch are imported inside the functions.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING, cast

from cottention.engine.errors import ConfigurationError
from cottention.engine.sessions.store.protocol import UNLIMITED, Quotas
from cottention.server.config import ServerConfig

if TYPE_CHECKING:
    from cottention.engine.encoder_engine import EncoderEngine
    from cottention.engine.engine import Engine
    from cottention.engine.sessions.manager import SessionManager

logger = logging.getLogger("cottention")

PREFIX = "cottention-sessions-"


@contextlib.contextmanager
def sessions_of(
    engine: "Engine | EncoderEngine", config: ServerConfig, quotas: Quotas
) -> Iterator["SessionManager | None"]:
    """As `open_sessions`; None for an encoder, which has none."""
    if "sessions" not in engine.capabilities:
        yield None
        return
    with open_sessions(cast("Engine", engine), config, quotas) as sessions:
        yield sessions


@contextlib.contextmanager
def open_sessions(
    engine: "Engine", config: ServerConfig, quotas: Quotas = lambda _: UNLIMITED
) -> Iterator["SessionManager"]:
    """The server's sessions; they are closed at the end of the block. Raises ConfigurationError."""
    from cottention.engine.sessions.maintenance import maintenance_thread
    from cottention.engine.sessions.manager import LEASE_SECONDS, SessionManager
    from cottention.engine.sessions.store import SqliteStore

    with contextlib.ExitStack() as stack:
        is_durable = config.session_dir is not None
        folder = stack.enter_context(_temporary()) if not is_durable else _given(config)
        sessions = SessionManager(
            SqliteStore(Path(folder), durable=is_durable, quotas=quotas),
            engine.session_codec(),
            memory_bytes=config.session_memory,
            max_checkpoints=config.session_checkpoints,
            is_durable=is_durable,
            ttl_seconds=config.session_ttl_seconds,
        )
        stack.callback(sessions.close)
        stack.enter_context(maintenance_thread(sessions.maintain, LEASE_SECONDS / 3))
        yield sessions


def check_folder(config: ServerConfig) -> None:
    """Check the folder before the model is loaded. Raises ConfigurationError."""
    from cottention.engine.sessions.store import folder_lock

    if config.session_dir is not None:
        folder_lock.check_folder(Path(_given(config)))


def describe_storage(config: ServerConfig) -> str:
    """Where sessions are kept, for the lines that are printed at start-up."""
    if config.session_dir is None:
        return "kept until the server ends; --session-dir keeps them longer"
    return f"kept in {Path(config.session_dir).absolute()}"


def _temporary() -> TemporaryDirectory[str]:
    """A folder that is removed with the server; removes those of servers that were killed."""
    from cottention.engine.sessions.store.folder_lock import remove_leftovers

    if removed := remove_leftovers(Path(gettempdir()), PREFIX):
        logger.info("removed the sessions of %d server(s) that were killed", len(removed))
    return TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)


def _given(config: ServerConfig) -> str:
    """The folder of --session-dir. ConfigurationError where the flag is empty."""
    if not config.session_dir:
        raise ConfigurationError(
            "--session-dir must name a folder; it is empty: without the flag sessions are kept"
            " until the server ends"
        )
    return config.session_dir
