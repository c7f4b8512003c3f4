"""The index as an SQLite database: its schema, its transactions, and a damaged file set aside."""

import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Literal, TypeVar

from cottention.engine.errors import ConfigurationError
from cottention.engine.sessions.store import answers
from cottention.engine.sessions.store.faults import is_disk_full, reason_of
from cottention.engine.sessions.store.folder_lock import sync_folder

logger = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]
Sync = Literal["FULL", "NORMAL", "OFF"]

VERSION = 5

MAX_WAIT = 5.0
"""Seconds to wait for another program that has the file open for writing, such as a shell."""

# seq: grows with every session, so that newest first needs no clock. expires_at is by the store's
# time (`StoreClock`), lease_until by the monotonic clock of the process: leases end at a start.
# clock: one row, the last ClockReading. states: a session's blobs, the one with the greatest n its
# head, the others its checkpoints. The last events_nbytes of a blob are its turn's event log. The
# rows of a session that was set aside stay, so that its blobs are not removed. metadata: texts by
# their content, each stored once; triggers remove what no session has. usage: what each owner's
# sessions take, which triggers keep, so that no path can miss it.
SCHEMA = f"""
CREATE TABLE sessions (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
    created INTEGER NOT NULL, version INTEGER NOT NULL DEFAULT 1, metadata_key INTEGER NOT NULL,
    metadata_nbytes INTEGER NOT NULL, expires_at REAL, was_interrupted INTEGER NOT NULL DEFAULT 0,
    fence INTEGER NOT NULL DEFAULT 0, lease_owner TEXT, lease_until REAL, lease_version INTEGER);
CREATE INDEX sessions_by_owner ON sessions (owner, seq);
CREATE INDEX sessions_by_expiry ON sessions (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX sessions_by_metadata ON sessions (metadata_key);
CREATE INDEX sessions_by_lease ON sessions (lease_owner) WHERE lease_owner IS NOT NULL;
CREATE TABLE metadata (
    key INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, text TEXT NOT NULL);
CREATE TABLE usage (
    owner TEXT PRIMARY KEY, num_sessions INTEGER NOT NULL, nbytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE states (
    seq INTEGER NOT NULL, n INTEGER NOT NULL, digest TEXT NOT NULL,
    position INTEGER NOT NULL, nbytes INTEGER NOT NULL,
    context_policy TEXT NOT NULL, events_nbytes INTEGER NOT NULL,
    PRIMARY KEY (seq, n)) WITHOUT ROWID;
CREATE INDEX states_by_digest ON states (digest, nbytes, position);
CREATE TABLE set_aside (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL, owner TEXT NOT NULL, created INTEGER NOT NULL,
    version INTEGER NOT NULL, metadata TEXT NOT NULL, expires_at REAL, reason TEXT NOT NULL);
CREATE TRIGGER session_added AFTER INSERT ON sessions BEGIN
    INSERT INTO usage VALUES (NEW.owner, 1, NEW.metadata_nbytes) ON CONFLICT (owner) DO UPDATE SET
        num_sessions = num_sessions + 1, nbytes = nbytes + NEW.metadata_nbytes;
END;
CREATE TRIGGER session_removed AFTER DELETE ON sessions BEGIN
    UPDATE usage SET num_sessions = num_sessions - 1, nbytes = nbytes - OLD.metadata_nbytes
        - (SELECT ifnull(sum(nbytes), 0) FROM states WHERE seq = OLD.seq) WHERE owner = OLD.owner;
    DELETE FROM usage WHERE owner = OLD.owner AND num_sessions = 0;
    DELETE FROM metadata WHERE key = OLD.metadata_key
        AND NOT EXISTS (SELECT 1 FROM sessions WHERE metadata_key = OLD.metadata_key);
END;
CREATE TRIGGER state_added AFTER INSERT ON states BEGIN
    UPDATE usage SET nbytes = nbytes + NEW.nbytes
        WHERE owner = (SELECT owner FROM sessions WHERE seq = NEW.seq);
END;
CREATE TRIGGER state_removed AFTER DELETE ON states BEGIN
    UPDATE usage SET nbytes = nbytes - OLD.nbytes
        WHERE owner = (SELECT owner FROM sessions WHERE seq = OLD.seq);
END;
CREATE TABLE reserve (bytes BLOB NOT NULL);
CREATE TABLE clock (time REAL NOT NULL, wall REAL NOT NULL);
PRAGMA user_version = {VERSION};
"""

# turns: those that go on without their client, each under the fence of the lease that runs it.
# chunks: what they have generated and told, in the order of (fence, n): ids, int32 each, and the
# bytes of events. Releases of the same format version may lack these tables: they go on without.
JOURNAL = """
CREATE TABLE IF NOT EXISTS turns (
    session TEXT PRIMARY KEY, fence INTEGER NOT NULL, model TEXT NOT NULL, owner TEXT NOT NULL,
    turn TEXT NOT NULL, name TEXT NOT NULL, path TEXT NOT NULL, body BLOB NOT NULL,
    seed INTEGER NOT NULL, created INTEGER NOT NULL, deadline REAL, key TEXT, token TEXT,
    tries INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS chunks (
    session TEXT NOT NULL, fence INTEGER NOT NULL, n INTEGER NOT NULL, ids BLOB NOT NULL,
    events BLOB NOT NULL, PRIMARY KEY (session, fence, n));
"""

LOG_PAGES = 200
RESERVE_BYTES = 2 << 20
"""More than LOG_PAGES of 4096 bytes and the largest transaction after them."""
PAGES_KEPT = 640
"""Free pages that stay in the file: the reserve, and what the next sessions need."""
PAGES_AT_ONCE = 256
"""Free pages that are given back in one transaction, for which turns wait."""
MIN_LOG_PAGES = 16
"""Without room for the reserve the log is restarted after so few, which makes leases slower."""


class Database:
    """Transactions one at a time, from any thread. `lock` may be held around several.

    is_uncertain: the last commit failed in such a way that a restart may still find it done, so
    no file that it may refer to can be removed.
    """

    def __init__(self, path: Path, *, durable: bool) -> None:
        self.lock = threading.RLock()
        self.is_uncertain = False
        self._path = path
        self._db = connect(path)
        self._durable: Sync = "FULL" if durable else "OFF"
        self._relaxed: Sync = "NORMAL" if durable else "OFF"

    def read(self, work: Work[T]) -> T:
        """Run `work` while no other thread is in a transaction."""
        with self.lock:
            return work(self._db)

    def write(self, work: Work[T]) -> T:
        """Run `work` as one transaction, which is on the disk when this returns."""
        os.stat(self._path)  # a file that was removed takes writes until it is closed
        return self._run(work, self._durable)

    def write_relaxed(self, work: Work[T]) -> T:
        """As `write`, without waiting for the disk: a kill loses nothing, a loss of power may.

        For leases, which end with the machine in any case.
        """
        return self._run(work, self._relaxed)

    def give_back(self) -> bool:
        """Give some of the file's free pages back to the disk; whether there are more."""
        with self.lock:
            [num_free] = self._db.execute("PRAGMA freelist_count").fetchone()
            excess = num_free - PAGES_KEPT
            if excess > 0:
                num_pages = min(excess, PAGES_AT_ONCE)
                self._run(
                    lambda db: db.execute(f"PRAGMA incremental_vacuum({num_pages})").fetchall(),
                    self._relaxed,
                )
            return bool(excess > PAGES_AT_ONCE)

    def free_reserve(self) -> None:
        """Give back what `reserve_space` took for the log, which grows again as needed."""
        with self.lock:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Write the log back into the file, and close it."""
        with self.lock:
            self._db.close()

    def _run(self, work: Work[T], sync: Sync) -> T:
        with self.lock:
            self._roll_back()  # what could not be rolled back before
            self._db.execute(f"PRAGMA synchronous = {sync}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                result = work(self._db)
                self._commit()
            except BaseException:
                with suppress(sqlite3.OperationalError):  # the next transaction tries again
                    self._roll_back()
                raise
            return result

    def _roll_back(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def _commit(self) -> None:
        try:
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            # a full disk cuts the log before its last frame; other errors may come after it
            self.is_uncertain = not is_disk_full(error)
            raise
        self.is_uncertain = False


def connect(path: Path) -> sqlite3.Connection:
    """Open an index, and create it where there is none.

    ConfigurationError: it has another version.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    db = sqlite3.connect(path, MAX_WAIT, isolation_level=None, check_same_thread=False)
    try:
        set_up(db, path)
    except BaseException:
        db.close()
        raise
    return db


def set_up(db: sqlite3.Connection, path: Path) -> None:
    """Set the connection's modes, and create the tables of a new file. ConfigurationError."""
    [version] = db.execute("PRAGMA user_version").fetchone()
    if version == 0:
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # of an empty file alone: before its mode
    db.execute("PRAGMA journal_mode = WAL")
    db.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES}")
    if version == 0:
        db.executescript(f"BEGIN; {SCHEMA} COMMIT;")
    elif version != VERSION:
        raise ConfigurationError(
            f"{path} has format version {version}, and this server reads version {VERSION} only:"
            " give --session-dir another folder, or serve this one with the release that wrote it"
        )
    db.executescript(answers.SCHEMA)
    db.executescript(JOURNAL)
    reserve_space(db)


def reserve_space(db: sqlite3.Connection) -> None:
    """Grow the log, and the file's free pages, to what leases and deletions can ever need.

    They then work on a full disk as well: while the log is open it is overwritten and never cut.
    Where there is no room for it the index is used without.
    """
    try:
        db.execute("INSERT INTO reserve VALUES (zeroblob(?))", [RESERVE_BYTES])
        db.execute("DELETE FROM reserve")
    except sqlite3.OperationalError as error:
        db.execute(f"PRAGMA wal_autocheckpoint = {MIN_LOG_PAGES}")
        logger.warning("no space is reserved for leases on a full disk: %s", reason_of(error))


def find_damage(path: Path) -> str | None:
    """What is wrong with an index file; None where nothing is.

    Only what SQLite reports as damage: a file that is locked or cannot be read may be whole.
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
        return "it is empty"
    return None if answer == "ok" else str(answer)


def set_damaged_aside(folder: Path, index: str, states: str) -> None:
    """Rename a damaged index and its blobs, which only it could name.

    The blobs of a missing index are renamed as well.
    """
    path = folder / index
    reason = find_damage(path) if path.exists() else "it is missing"
    if reason is None or not (path.exists() or (folder / states).exists()):
        return
    n = 1
    while any(folder.glob(f"*.damaged-{n}*")):
        n += 1
    # the blobs first: after a crash between the two, the next start would remove the blobs
    for name in (states, index, f"{index}-wal", f"{index}-shm"):
        if (folder / name).exists():
            (folder / name).rename(folder / f"{name}.damaged-{n}")
    sync_folder(folder)
    logger.error(
        "%s cannot be used (%s): it and its blobs are renamed to .damaged-%d, and the server begins"
        " with no sessions. To have those of before, stop it and restore the folder from a backup",
        path,
        reason,
        n,
    )
