"""`PostgresStore`: sessions in a PostgreSQL database, which many servers use at once."""

import contextlib
import hashlib
import logging
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import partial
from secrets import randbits, token_hex
from typing import BinaryIO

import psycopg

from cottention.engine.errors import (
    ConfigurationError,
    SessionNotFoundError,
    SnapshotError,
    StoreUnavailableError,
    StoreUnreachableError,
)
from cottention.engine.sessions.store.answers import require_kept
from cottention.engine.sessions.store.postgres import answers, queries
from cottention.engine.sessions.store.postgres.blobs import (
    Blob,
    as_digest,
    change_blobs,
    inflated,
)
from cottention.engine.sessions.store.postgres.connections import (
    MAX_CONNECTIONS,
    UNREACHABLE,
    Connections,
    Db,
    RunAgainError,
    reason_of,
)
from cottention.engine.sessions.store.postgres.journal import PostgresJournal
from cottention.engine.sessions.store.postgres.key_ledger import PostgresKeyLedger
from cottention.engine.sessions.store.postgres.queries import Stored
from cottention.engine.sessions.store.postgres.replica import LIFE_SECONDS, Replica
from cottention.engine.sessions.store.postgres.schema import migrate
from cottention.engine.sessions.store.protocol import (
    UNLIMITED,
    Answer,
    BlobReader,
    Claim,
    Claimed,
    Ids,
    Lease,
    NewSession,
    Quotas,
    Records,
    SessionRecord,
    SessionStore,
    StoreCounts,
)

logger = logging.getLogger(__name__)

HOLD_SECONDS = 30.0
"""How long a turn that has ended waits for the database to take it."""
PIECE_BYTES = 1 << 20
MANY_SESSIONS = 10_000
SECONDS_TO_COUNT = 60.0
MAX_LEASED = 4096
"""Sessions whose states are remembered while they are leased."""


class SpooledPart(BlobReader):
    """A part of a blob, in a temporary file of this machine."""

    def __init__(self, file: BinaryIO, start: int, stop: int) -> None:
        self.nbytes = stop - start
        self._file = file
        self._start = start
        self._lock = threading.Lock()

    def read(self, start: int, num_bytes: int) -> bytes:
        with self._lock:
            self._file.seek(self._start + start)
            return self._file.read(min(num_bytes, self.nbytes - start))

    def close(self) -> None:
        with self._lock:
            self._file.close()


class PostgresStore(SessionStore):
    """See SessionStore. A lease ends with the life of its replica, or at its own time.

    A session whose holder has died is taken over, and the fence refuses what the old holder may
    still write.
    """

    is_shared = True

    def __init__(
        self,
        url: str,
        *,
        password: str | None = None,
        quotas: Quotas = lambda _: UNLIMITED,
        name: str = "replica",
        replica_url: str | None = None,
        build: str = "",
        model: str = "",
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        """url: without a password; password: None where PGPASSWORD or PGPASSFILE has it.

        name, replica_url, build, model: what the table of replicas says of this one.
        ConfigurationError: the database cannot be used.
        """
        self._quotas = quotas
        self._leased = LeasedSessions()
        self._counted = 0.0, StoreCounts(0, 0)
        self._connections = Connections(url, password, max_connections)
        self._replica = Replica(
            self._connections, name=name, url=replica_url, build=build, model=model
        )
        self.key_ledger = PostgresKeyLedger(self._connections, self._replica)
        self.journal = PostgresJournal(self._connections, self._replica, model)
        try:
            self._connections.open()
            self._connections.write(migrate)
            self._connections.statement(_warn_of_asynchronous_standbys)
            self._replica.start()
        except (psycopg.Error, StoreUnavailableError) as error:
            self._connections.close()
            raise ConfigurationError(
                f"the database of --session-store cannot be used: {reason_of(error)}"
            ) from error
        except BaseException:
            self._connections.close()
            raise

    @property
    def replica_id(self) -> str:
        """Of this process in the table of replicas."""
        return self._replica.id

    @property
    def is_alive(self) -> bool:
        """Whether this replica's last heartbeat is young enough for its leases to be valid."""
        return self._replica.is_alive

    def create(self, records: Sequence[NewSession], answer: Answer | None = None) -> Records:
        ids = [new.id or queries.new_id() for new in records]
        blobs = [
            None
            if new.snapshot is None
            else Blob.of(new.snapshot, new.events, new.position, new.context_policy)
            for new in records
        ]
        named = [
            as_digest(name)
            for new, blob in zip(records, blobs, strict=True)
            for name in [*new.checkpoints, *([] if blob else [new.head or ""])]
        ]

        def insert(db: Db) -> Records:
            owners = {new.owner for new in records}
            limited = {owner for owner in owners if self._quotas(owner) != UNLIMITED}
            before = {owner: queries.usage_of(db, owner) for owner in sorted(limited)}
            change_blobs(db, [blob for blob in blobs if blob], [], named)
            for session_id, new, blob in zip(ids, records, blobs, strict=True):
                queries.insert_session(db, session_id, new, blob)
            for owner, usage in before.items():
                self._quotas(owner).check(usage, queries.usage_of(db, owner))
            made = queries.read_sessions(db, ids)
            _keep(db, answer, made)
            return made

        def find(db: Db) -> Records | None:
            try:
                return queries.read_sessions(db, ids)
            except SessionNotFoundError:
                return None

        return self._connections.write(insert, find)

    def acquire(
        self, session_id: str, ttl_seconds: float, owner: str | None = None
    ) -> tuple[Lease, SessionRecord]:
        # a repetition takes what the first try may have leased
        values = {"replica": self._replica.id, "turn": _new_turn(), "seconds": ttl_seconds}
        lease, stored = self._connections.statement(
            lambda db: queries.acquire(db, session_id, owner, values)
        )
        self._leased.put(lease, stored)
        return lease, stored.record

    def renew(self, lease: Lease, ttl_seconds: float) -> None:
        self._connections.statement(
            lambda db: queries.renew(db, lease, self._replica.id, ttl_seconds)
        )

    def release(self, lease: Lease) -> None:
        self._leased.pop(lease)
        if not self.journal.has(lease):
            self._connections.statement(lambda db: queries.release(db, lease, self._replica.id))
            return

        def change(db: Db) -> None:
            self.journal.end(db, lease)
            queries.release(db, lease, self._replica.id)

        self._connections.write(change)
        self.journal.forget(lease)

    def head(self, session_id: str) -> int:
        return self.record(session_id).version

    def record(self, session_id: str) -> SessionRecord:
        return self._read(session_id).record

    def _read(self, session_id: str, *, may_be_over: bool = False) -> Stored:
        return self._connections.statement(
            lambda db: queries.read_session(db, session_id, may_be_over=may_be_over)
        )

    def get(self, digest: str) -> bytes:
        key = as_digest(digest)
        statement = "SELECT nbytes, bytes FROM cottention.blobs WHERE digest = %s"
        row = self._connections.statement(lambda db: db.execute(statement, [key]).fetchone())
        if row is None:
            raise SnapshotError(f"snapshot {digest} is missing")
        raw = inflated(bytes(row[1]), row[0])
        _check(hashlib.sha256(raw).digest(), key)
        return raw

    def open_blob(self, digest: str, start: int, stop: int) -> BlobReader:
        """Spooled to a temporary file first: a transaction must not wait for a slow client."""
        key = as_digest(digest)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(tempfile.TemporaryFile())
            checksum = hashlib.sha256()
            at, nbytes = 0, 1
            while at < nbytes:
                row = self._connections.statement(partial(_piece, key=key, at=at))
                if row is None:
                    raise SnapshotError(f"snapshot {digest} is missing")
                nbytes, is_deflated, piece = row[0], row[1], bytes(row[2])
                if is_deflated:  # then it is one piece
                    piece = inflated(piece, nbytes)
                    nbytes = len(piece)
                at += len(piece)
                checksum.update(piece)
                file.write(piece)
            _check(checksum.digest(), key)
            stack.pop_all()
        return SpooledPart(file, start, stop)

    def commit(
        self,
        lease: Lease,
        expected_version: int,
        snapshot: bytes,
        position: int,
        max_checkpoints: int,
        context_policy: str = "exact",
        events: bytes = b"",
        *,
        keeps_lease: bool = False,
        answer: Answer | None = None,
    ) -> SessionRecord:
        blob = Blob.of(snapshot, events, position, context_policy)
        turn = _new_turn()
        stored = self._leased.pop(lease)
        if stored is None or stored.record.version != expected_version:
            stored = self._read_leased(lease, expected_version)
        owner, before = stored.record.owner, stored.nbytes
        is_limited = self._quotas(owner) != UNLIMITED

        ends = not keeps_lease and self.journal.has(lease)
        may_replace = True

        def change(db: Db) -> Stored:
            nonlocal may_replace
            try:
                after = queries.commit(
                    *(db, lease, stored, blob, max_checkpoints, turn, self._replica.id),
                    keeps_lease=keeps_lease,
                    may_replace=may_replace,
                )
            except psycopg.errors.UniqueViolation as error:
                if not may_replace:
                    raise
                may_replace = False  # another session has the same blob
                raise RunAgainError from error
            growth = after.nbytes - before
            if is_limited and growth > 0:
                usage = queries.usage_of(db, owner)
                self._quotas(owner).check((usage[0], usage[1] - growth), usage)
            _keep(db, answer, [after.record])
            if ends:
                self.journal.end(db, lease)
            return after

        after = self._connections.write(
            change,
            lambda db: queries.find_commit(db, lease, expected_version, blob, turn),
            seconds=HOLD_SECONDS,
            is_statement=not (is_limited or ends or answer is not None),
        )
        if keeps_lease:
            self._leased.put(lease, after)
        else:
            self.journal.forget(lease)
        return after.record

    def _read_leased(self, lease: Lease, expected_version: int) -> Stored:
        """SessionMovedError where it is not at this version."""
        try:
            stored = self._read(lease.session_id, may_be_over=True)
        except SessionNotFoundError:
            raise queries.moved(lease, expected_version) from None
        if stored.record.version != expected_version:
            raise queries.moved(lease, expected_version)
        return stored

    def rewind(self, lease: Lease, expected_version: int) -> SessionRecord:
        turn = _new_turn()

        def change(db: Db) -> Stored:
            return queries.rewind(db, lease, expected_version, turn, self._replica.id)

        def find(db: Db) -> Stored | None:
            if not queries.is_rewound(db, lease, expected_version, turn):
                return None
            return queries.read_session(db, lease.session_id, may_be_over=True)

        self._leased.pop(lease)
        return self._connections.write(change, find).record

    def delete(self, session_id: str) -> None:
        def find(db: Db) -> bool | None:
            try:
                queries.read_session(db, session_id)
            except SessionNotFoundError:
                return True
            return None

        def change(db: Db) -> bool:
            queries.delete(db, session_id, self._replica.id)
            return True

        self._connections.write(change, find)

    def list(self, owner: str, after: str | None, limit: int) -> tuple[Records, bool]:
        return self._connections.statement(
            lambda db: queries.list_sessions(db, owner, after, limit)
        )

    def claim(self, owner: str, key: str, request: bytes, seconds: float) -> Claim | Claimed:
        new = Claim(owner, key, token_hex(8))
        return self._connections.write(
            lambda db: answers.claim(db, new, request, self._replica.id, seconds)
        )

    def keep_answer(self, claim: Claim, answer: bytes) -> None:
        self._connections.write(lambda db: answers.keep(db, claim, answer))

    def drop_claim(self, claim: Claim) -> None:
        self._connections.statement(lambda db: answers.drop(db, claim))

    def counts(self) -> StoreCounts:
        """Of many sessions, as they were at most SECONDS_TO_COUNT ago: it reads all of them."""
        counted_at, found = self._counted
        if found.num_sessions >= MANY_SESSIONS and time.monotonic() < counted_at + SECONDS_TO_COUNT:
            return found
        statement = (
            "SELECT (SELECT count(*) FROM cottention.sessions),"
            " (SELECT coalesce(sum(nbytes), 0)::bigint FROM cottention.blobs)"
        )
        [row] = self._connections.statement(lambda db: db.execute(statement).fetchall())
        found = StoreCounts(*row)
        self._counted = time.monotonic(), found
        return found

    def check_reachable(self) -> None:
        if not self.is_alive:
            raise StoreUnreachableError(
                f"no heartbeat has reached the database of sessions for {LIFE_SECONDS:g} s"
            )

    def now(self) -> float:
        return self._replica.now()

    def unix_time(self, moment: float) -> float:
        """The same: the store's time is the database's, in unix seconds."""
        return moment

    def expire(self, limit: int) -> Ids:
        self._connections.statement(lambda db: answers.expire(db, limit))
        return self._connections.write(lambda db: queries.expire(db, limit, self._replica.id))

    def give_back(self) -> bool:
        """PostgreSQL's autovacuum does it."""
        return False

    def free_reserve(self) -> None:
        """There is none."""

    def close(self) -> None:
        """Nothing happens the second time."""
        with contextlib.suppress(*UNREACHABLE):
            self._replica.stop()
        self._connections.close()


class LeasedSessions:
    """The sessions that this replica has leased, as they are stored. Thread-safe.

    A commit needs a session's states, which are those that were read with its lease unless another
    turn has moved it, and then the commit is refused. What is not here is read again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[Lease, Stored] = {}

    def put(self, lease: Lease, stored: Stored) -> None:
        """Keep it until it is asked for; the oldest go where leases are left to run out."""
        with self._lock:
            self._found[lease] = stored
            if len(self._found) > MAX_LEASED:
                del self._found[next(iter(self._found))]

    def pop(self, lease: Lease) -> Stored | None:
        """What was put last, once."""
        with self._lock:
            return self._found.pop(lease, None)


def _new_turn() -> int:
    """Names a transaction among the last ones of a session."""
    return randbits(63)


def _warn_of_asynchronous_standbys(db: Db) -> None:
    [[num_standbys, names]] = db.execute(
        "SELECT (SELECT count(*) FROM pg_stat_replication),"
        " current_setting('synchronous_standby_names')"
    ).fetchall()
    if num_standbys and not names:
        logger.warning(
            "the database has standbys and no synchronous_standby_names: a failover to one of them"
            " may lose turns that were answered"
        )


def _keep(db: Db, answer: Answer | None, records: Records) -> None:
    """Store the answer of a transaction that has stored these sessions. SessionMovedError."""
    if answer is not None:
        require_kept(answers.keep(db, answer.claim, answer.make(records)))


def _piece(db: Db, key: bytes, at: int) -> "tuple[int, bool, bytes] | None":
    row = db.execute(
        "SELECT nbytes, octet_length(bytes) < nbytes, substring(bytes FROM %s FOR %s)"
        " FROM cottention.blobs WHERE digest = %s",
        [at + 1, PIECE_BYTES, key],
    ).fetchone()
    return row and (row[0], row[1], row[2])


def _check(found: bytes, key: bytes) -> None:
    if found != key:
        raise SnapshotError(f"snapshot {key.hex()} is damaged in the database")
