"""Connections to PostgreSQL: a pool, transactions that are repeated, commits in doubt.

Every transaction stands by itself: no prepared statements, no settings of a connection, so that
PgBouncer may give each to another server connection.
"""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from cottention.engine.errors import (
    ConfigurationError,
    SessionError,
    StoreFullError,
    StoreUnreachableError,
)
from cottention.engine.sessions.store.postgres.address import check_address

try:
    import psycopg
    from psycopg_pool import ConnectionPool, PoolTimeout
except ImportError as error:
    raise ConfigurationError(
        "--session-store needs psycopg: install it with pip install 'cottention-server[cluster]'"
    ) from error

logger = logging.getLogger(__name__)

T = TypeVar("T")
Db = psycopg.Connection[Any]
Work = Callable[[Db], T]

MAX_CONNECTIONS = 16
CONNECT_SECONDS = 10
POOL_SECONDS = 3.0
"""How long one attempt waits for a connection of the pool."""
ATTEMPT_SECONDS = 15.0
"""After which a transaction's connection is cut: the network may swallow packets without a word."""
RETRY_SECONDS = 5.0
"""How long an operation is repeated while the database cannot be reached."""
PAUSE_SECONDS = 0.1
WATCH_SECONDS = 0.25

# A client that is gone must not keep its locks. As a part of each transaction: settings of a
# connection would not survive PgBouncer's transaction mode.
BEGIN = (
    "BEGIN; SET LOCAL idle_in_transaction_session_timeout = '10s'; SET LOCAL lock_timeout = '10s'"
)
BEGIN_RELAXED = f"{BEGIN}; SET LOCAL synchronous_commit = off"


class RunAgainError(Exception):
    """What `work` has done shall be undone: it is run again, and goes another way."""


UNREACHABLE = (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout)
REPEATABLE = (
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
    psycopg.errors.LockNotAvailable,
    psycopg.errors.IdleInTransactionSessionTimeout,
    psycopg.errors.ReadOnlySqlTransaction,
    RunAgainError,
)
"""The transaction is undone, and may go well the next time, or at the next server."""
ENDINGS = ("08", "57")
"""Classes of SQLSTATE after which a connection ends: what ran may have been committed."""


class CommitInDoubtError(Exception):
    """The connection broke while a transaction was being committed: it may have been, or not."""


class Connections:
    """Transactions on one database, from any thread.

    url: without a password; password: None where libpq finds it (PGPASSWORD, PGPASSFILE).
    """

    def __init__(self, url: str, password: str | None, max_connections: int) -> None:
        check_address(url)
        self._url = url
        self._password = {} if password is None else {"password": password}
        self._pool = ConnectionPool(
            url,
            min_size=1,
            max_size=max_connections,
            open=False,
            kwargs=self._settings(),
            reconnect_timeout=1.0,  # who waits asks again; a longer one would have longer pauses
            num_workers=2,
            name="sessions",
        )
        self._watch = Watch()
        logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # `_unreachable` logs it

    def open(self) -> None:
        """Connect once. ConfigurationError: the database cannot be reached or refuses us."""
        try:
            self.connect().close()
        except UNREACHABLE as error:
            raise ConfigurationError(
                f"the database of --session-store cannot be used: {reason_of(error)}"
            ) from error
        self._pool.open()

    def close(self) -> None:
        """Close all connections. Idempotent."""
        self._watch.close()
        self._pool.close()

    def connect(self) -> Db:
        """A connection outside the pool. Raises psycopg's errors."""
        return psycopg.connect(self._url, **self._settings())

    @contextlib.contextmanager
    def watched(self, db: Db, seconds: float) -> Iterator[None]:
        """Cut the connection where the block takes longer than this."""
        with self._watch.until(db, time.monotonic() + seconds):
            yield

    def statement(self, work: Work[T]) -> T:
        """Run `work`, whose statements are transactions of their own, and may run twice.

        StoreUnreachableError.
        """
        return self._repeat(lambda: self._attempt(work), RETRY_SECONDS, None)

    def write(
        self,
        work: Work[T],
        find: Callable[[Db], T | None] | None = None,
        *,
        relaxed: bool = False,
        seconds: float = RETRY_SECONDS,
        is_statement: bool = False,
    ) -> T:
        """Run `work` as one transaction, which is committed when this returns.

        Repeated while the database cannot be reached, `seconds` long. find: where a commit is in
        doubt, the result that its transaction has left; None: it has left nothing, and `work` may
        run again. Without it, `work` may run twice. relaxed: a crash of the database may lose it.
        is_statement: `work` is one statement, which needs no BEGIN and COMMIT around it.
        StoreUnreachableError; after a commit in doubt, it may still turn out to be done.
        """
        begin = BEGIN_RELAXED if relaxed else BEGIN
        attempt = self._attempt_statement if is_statement else partial(self._attempt, begin=begin)
        return self._repeat(lambda: attempt(work), seconds, find)

    def _repeat(
        self, attempt: Callable[[], T], seconds: float, find: Callable[[Db], T | None] | None
    ) -> T:
        deadline = time.monotonic() + seconds
        is_in_doubt = False
        while True:
            try:
                if is_in_doubt and find is not None:
                    found = self._attempt(find)
                    if found is not None:
                        return found
                return attempt()
            except CommitInDoubtError as error:
                is_in_doubt, reason = True, error.__cause__
            except (SessionError, psycopg.errors.UniqueViolation):
                # the transaction in doubt may have ended after `find` has looked
                found = self._attempt(find) if is_in_doubt and find else None
                if found is None:
                    raise
                return found
            except psycopg.errors.DiskFull as error:
                raise StoreFullError(f"the database's disk is full: {reason_of(error)}") from error
            except (*REPEATABLE, *UNREACHABLE) as error:
                reason = error
            if time.monotonic() > deadline:
                raise _unreachable(reason) from reason
            time.sleep(PAUSE_SECONDS)

    def _attempt_statement(self, work: Work[T]) -> T:
        with self._pool.connection(POOL_SECONDS) as db, self.watched(db, ATTEMPT_SECONDS):
            try:
                return work(db)
            except psycopg.Error as error:
                if db.closed or (error.sqlstate or "08")[:2] in ENDINGS:
                    raise CommitInDoubtError from error
                raise

    def _attempt(self, work: Work[T], begin: str | None = None) -> T:
        with self._pool.connection(POOL_SECONDS) as db, self.watched(db, ATTEMPT_SECONDS):
            if begin is None:
                return work(db)
            db.execute(begin.encode())
            result = work(db)
            try:
                db.execute("COMMIT")
            except psycopg.Error as error:
                raise CommitInDoubtError from error
            return result

    def _settings(self) -> dict[str, Any]:
        return {
            "autocommit": True,
            "prepare_threshold": None,
            "connect_timeout": CONNECT_SECONDS,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "application_name": "cottention",
            **self._password,
        }


class Watch:
    """A thread that cuts connections whose deadline has passed, so that nobody waits for ever."""

    def __init__(self) -> None:
        self._deadlines: dict[Db, float] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="session-store-watch", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def until(self, db: Db, deadline: float) -> Iterator[None]:
        """Cut the connection if the block lasts beyond this moment of the monotonic clock."""
        with self._lock:
            self._deadlines[db] = deadline
        try:
            yield
        finally:
            with self._lock:
                del self._deadlines[db]

    def close(self) -> None:
        """Stop watching."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(WATCH_SECONDS):
            now = time.monotonic()
            with self._lock:
                for db, deadline in self._deadlines.items():
                    if now > deadline:
                        with contextlib.suppress(psycopg.Error, OSError):
                            _cut(db.fileno())


def _cut(fileno: int) -> None:
    """End a connection of another thread, which then finds it broken. Its descriptor stays."""
    with socket.fromfd(fileno, socket.AF_UNSPEC, socket.SOCK_STREAM) as copy:
        copy.shutdown(socket.SHUT_RDWR)


_logged: dict[str, float] = {}


def _unreachable(reason: BaseException | None) -> StoreUnreachableError:
    message = f"the database of sessions cannot be used: {reason_of(reason)}"
    now = time.monotonic()
    if now - _logged.get(message, -60.0) >= 60.0:
        _logged[message] = now
        logger.warning("%s", message)
    return StoreUnreachableError(message)


def reason_of(error: BaseException | None) -> str:
    """An error in one line. It never has a password: libpq names host, port and user alone."""
    return " ".join(str(error).split()) or type(error).__name__
