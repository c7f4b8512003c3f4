"""The index: one SQLite file, its transactions, and what happens where it is damaged.

Owns the connection, the schema and how durable a transaction is. Does not know what the rows mean.
"""

import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Literal, TypeVar

from cottention.engine.errors import ConfigurationError
from cottention.engine.sessions.store.folder_lock import means_full, sync_folder

logger = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]
Sync = Literal["FULL", "NORMAL", "OFF"]

VERSION = 2

MAX_WAIT = 5.0
"""Seconds for a person's tool that has the file open for writing."""

# states: a session's snapshots, the one with the greatest n its head, the others its checkpoints.
# Those of a session that was set aside stay, so that their files do.
SCHEMA = f"""
CREATE TABLE sessions (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
    created INTEGER NOT NULL, version INTEGER NOT NULL DEFAULT 1, metadata TEXT NOT NULL,
    expires_at REAL, was_interrupted INTEGER NOT NULL DEFAULT 0,
    fence INTEGER NOT NULL DEFAULT 0, lease_owner TEXT, lease_until REAL, lease_version INTEGER);
CREATE INDEX sessions_by_owner ON sessions (owner, created, seq);
CREATE INDEX sessions_by_expiry ON sessions (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX sessions_by_lease ON sessions (lease_owner) WHERE lease_owner IS NOT NULL;
CREATE TABLE states (
    seq INTEGER NOT NULL, n INTEGER NOT NULL, digest TEXT NOT NULL,
    position INTEGER NOT NULL, nbytes INTEGER NOT NULL,
    context_policy TEXT NOT NULL DEFAULT 'exact', PRIMARY KEY (seq, n)) WITHOUT ROWID;
CREATE INDEX states_by_digest ON states (digest, nbytes, position);
CREATE TABLE set_aside (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL, owner TEXT NOT NULL, created INTEGER NOT NULL,
    version INTEGER NOT NULL, metadata TEXT NOT NULL, expires_at REAL, reason TEXT NOT NULL);
CREATE TABLE room (bytes BLOB NOT NULL);
PRAGMA user_version = {VERSION};
"""

UPGRADES = {1: "ALTER TABLE states ADD COLUMN context_policy TEXT NOT NULL DEFAULT 'exact';"}
"""From older versions to this one."""

LOG_PAGES = 200
ROOM_BYTES = 2 << 20
"""More than LOG_PAGES of 4096 bytes and the greatest transaction after them."""
MIN_LOG_PAGES = 16
"""Where the disk has less room than that: the log begins again sooner, and leases take longer."""


class Database:
    """Transactions one at a time, from any thread. `lock` may be held around several.

    is_uncertain: the last commit failed in a way that a restart might still find it done, so
    no file that it may refer to can be removed.
    """

    def __init__(self, path: Path, *, durable: bool) -> None:
        self.lock = threading.RLock()
        self.is_uncertain = False
        self._db = connect(path)
        self._durable: Sync = "FULL" if durable else "OFF"
        self._noted: Sync = "NORMAL" if durable else "OFF"

    def read(self, work: Work[T]) -> T:
        """Run it outside any transaction of another thread."""
        with self.lock:
            return work(self._db)

    def write(self, work: Work[T]) -> T:
        """Run it as one transaction, on the disk when this returns."""
        return self._run(work, self._durable)

    def note(self, work: Work[T]) -> T:
        """For leases: outlives the process and not the machine, as a lease should; no waiting."""
        return self._run(work, self._noted)

    def free_room(self) -> None:
        """Give the disk what `make_room` took of it for the log; that grows again as it must."""
        with self.lock:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Write the log back into the file."""
        with self.lock:
            self._db.close()

    def _run(self, work: Work[T], sync: Sync) -> T:
        with self.lock:
            self._db.execute(f"PRAGMA synchronous = {sync}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                result = work(self._db)
                self._commit()
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            return result

    def _commit(self) -> None:
        try:
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            # a full disk cut the log before its last frame; anything else may have come after it
            self.is_uncertain = error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_FULL
            raise
        self.is_uncertain = False


def connect(path: Path) -> sqlite3.Connection:
    """An open index of this version; ConfigurationError for one of another."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    db = sqlite3.connect(path, MAX_WAIT, isolation_level=None, check_same_thread=False)
    try:
        set_up(db, path)
    except BaseException:
        db.close()
        raise
    return db


def set_up(db: sqlite3.Connection, path: Path) -> None:
    """Make the file's tables, or bring those of an older version up to this one."""
    db.execute("PRAGMA journal_mode = WAL")
    db.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES}")
    [version] = db.execute("PRAGMA user_version").fetchone()
    if version == 0:
        db.executescript(f"BEGIN; {SCHEMA} COMMIT;")
    elif version in UPGRADES:
        db.executescript(f"BEGIN; {UPGRADES[version]} PRAGMA user_version = {VERSION}; COMMIT;")
    elif version != VERSION:
        raise ConfigurationError(f"{path} has format {version}; this is a server of {VERSION}")
    make_room(db)


def make_room(db: sqlite3.Connection) -> None:
    """Grow the log, and free pages in the file, to what leases and deletions will ever need.

    They are then noted on a full disk, too: the log is written over, never cut, while it is open.
    """
    try:
        db.execute("INSERT INTO room VALUES (zeroblob(?))", [ROOM_BYTES])
        db.execute("DELETE FROM room")
    except sqlite3.OperationalError as error:
        if not means_full(error):
            raise
        db.execute(f"PRAGMA wal_autocheckpoint = {MIN_LOG_PAGES}")
        logger.warning("the disk is full: little room for leases could be kept back")


def trouble(path: Path) -> str | None:
    """What is wrong with an index file, None where nothing is.

    Only what SQLite calls damage: a file that is locked or cannot be read may be whole.
    """
    try:
        with closing(sqlite3.connect(path, MAX_WAIT)) as db:
            [answer] = db.execute("PRAGMA quick_check(1)").fetchone()
            [mode] = db.execute("PRAGMA journal_mode").fetchone()
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise
        return str(error)
    if answer == "ok" and mode != "wal":
        return "it holds nothing"
    return None if answer == "ok" else str(answer)


def set_damaged_aside(folder: Path, index: str, states: str) -> None:
    """Move a damaged or missing index, and the states only it could name, out of the way."""
    path = folder / index
    reason = trouble(path) if path.exists() else "it is missing"
    if reason is None or not (path.exists() or (folder / states).exists()):
        return
    n = 1
    while any(folder.glob(f"*.damaged-{n}*")):
        n += 1
    # the states first: were the index gone before them, the next start would sweep them
    for name in (states, index, f"{index}-wal", f"{index}-shm"):
        if (folder / name).exists():
            (folder / name).rename(folder / f"{name}.damaged-{n}")
    sync_folder(folder)
    logger.error("%s cannot be used (%s): kept beside a new one as .damaged-%d", path, reason, n)
