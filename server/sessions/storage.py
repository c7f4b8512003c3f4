"""Opens the session store for the time that the server runs, and starts its maintenance.

It is the database of --session-store, the folder of --session-dir, or a temporary folder that is
removed with the server. Modules that load torch, and what is an extra, are imported inside the
functions.
"""

import contextlib
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from cottention.engine.errors import ConfigurationError
from cottention.engine.sessions.store.postgres.address import read_password
from cottention.engine.sessions.store.protocol import UNLIMITED, Quotas
from cottention.server.config import ServerConfig
from cottention.server.version import package_version

if TYPE_CHECKING:
    from cottention.engine.encoder_engine import EncoderEngine
    from cottention.engine.engine import Engine
    from cottention.engine.sessions.manager import SessionManager
    from cottention.engine.sessions.snapshot import SnapshotCodec
    from cottention.engine.sessions.store import SessionStore
    from cottention.engine.sessions.store.journal import SessionJournal

logger = logging.getLogger("cottention")

PREFIX = "cottention-sessions-"


@contextlib.contextmanager
def sessions_of(
    engine: "Engine | EncoderEngine",
    config: ServerConfig,
    quotas: Quotas,
    own_url: str | None = None,
) -> Iterator["SessionManager | None"]:
    """As `open_sessions`; None for an encoder, which has none."""
    if "sessions" not in engine.capabilities:
        yield None
        return
    with open_sessions(cast("Engine", engine), config, quotas, own_url) as sessions:
        yield sessions


@contextlib.contextmanager
def open_sessions(
    engine: "Engine",
    config: ServerConfig,
    quotas: Quotas = lambda _: UNLIMITED,
    own_url: str | None = None,
) -> Iterator["SessionManager"]:
    """The server's sessions; they are closed at the end of the block. Raises ConfigurationError.

    own_url: where other servers that share them reach this one.
    """
    from cottention.engine.sessions.maintenance import maintenance_thread
    from cottention.engine.sessions.manager import LEASE_SECONDS, SessionManager

    with contextlib.ExitStack() as stack:
        is_durable = config.session_dir is not None or config.session_store is not None
        store, journal = _open_store(engine, config, quotas, own_url, stack)
        sessions = SessionManager(
            store,
            _codec(engine, config),
            memory_bytes=config.session_memory,
            max_checkpoints=config.session_checkpoints,
            is_durable=is_durable,
            ttl_seconds=config.session_ttl_seconds,
            journal=journal,
        )
        stack.callback(sessions.close)
        stack.enter_context(maintenance_thread(sessions.maintain, LEASE_SECONDS / 3))
        yield sessions


def _codec(engine: "Engine", config: ServerConfig) -> "SnapshotCodec":
    """ConfigurationError: the model's states are larger than the database takes."""
    if config.session_store is None:
        return engine.session_codec()
    writes_recipes = config.session_states == "auto" and engine.has_one_arithmetic
    codec = engine.session_codec(writes_recipes=writes_recipes, max_encoded=config.max_stored_state)
    if writes_recipes and engine.policies.default == "renew":
        return codec  # a session under `exact` may still be too large: its turn then says so
    if codec.max_nbytes > config.max_stored_state:
        raise ConfigurationError(
            f"a session of this model takes up to {codec.max_nbytes} bytes, more than"
            f" --max-stored-state, {config.max_stored_state}: raise it, which makes turns slower,"
            " or store the sessions in a folder with --session-dir"
        )
    return codec


def _open_store(
    engine: "Engine",
    config: ServerConfig,
    quotas: Quotas,
    own_url: str | None,
    stack: contextlib.ExitStack,
) -> "tuple[SessionStore, SessionJournal | None]":
    from cottention.engine.sessions.store import SqliteStore

    model = config.served_model_name or engine.name
    if config.session_store is not None:
        from cottention.engine.sessions.store.postgres.store import PostgresStore

        store = PostgresStore(
            config.session_store,
            password=_password(config),
            quotas=quotas,
            name=socket.gethostname(),
            replica_url=own_url,
            build=package_version(),
            model=model,
        )
        return store, store.journal
    if config.session_dir is None:
        folder = stack.enter_context(_temporary())
        return SqliteStore(Path(folder), durable=False, quotas=quotas), None
    folder_store = SqliteStore(Path(_given(config)), quotas=quotas, model=model)
    return folder_store, folder_store.journal


def _password(config: ServerConfig) -> str | None:
    path = config.session_store_password_file
    return None if path is None else read_password(path)


def check_storage(config: ServerConfig) -> None:
    """Check the folder, or the file with the database's password, before the model is loaded.

    Raises ConfigurationError.
    """
    from cottention.engine.sessions.store import folder_lock

    _password(config)
    if config.session_dir is not None:
        folder_lock.check_folder(Path(_given(config)))


def describe_storage(config: ServerConfig) -> str:
    """Where sessions are kept, for the lines that are printed at start-up."""
    if config.session_store is not None:
        return f"stored in PostgreSQL, {urlsplit(config.session_store).hostname or 'this machine'}"
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
