"""Sessions in a folder of this machine: an SQLite index, and a file for each blob.

A file is whole and durable before the index refers to it, and is removed after the last reference
to it has gone, all under the index's lock.

    <folder>/lock             held by the process that uses the folder
    <folder>/index.sqlite     sessions, their leases, and their states by digest
    <folder>/states/ab/ab…    blobs by digest: a snapshot, then its turn's event log
"""

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from cottention.engine.sessions.store import answers, queries
from cottention.engine.sessions.store.blobs import Blobs, Staged
from cottention.engine.sessions.store.clock import (
    STEP_SECONDS,
    ClockReading,
    StoreClock,
    seconds_since_boot,
)
from cottention.engine.sessions.store.database import Database, set_damaged_aside
from cottention.engine.sessions.store.faults import StoreFaults
from cottention.engine.sessions.store.folder_lock import (
    TEMPORARY,
    lock_folder,
    raise_unusable_folder,
)
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
from cottention.engine.sessions.store.recovery import recover
from cottention.engine.sessions.store.sqlite_journal import SqliteJournal

INDEX, STATES = "index.sqlite", "states"

SECONDS_BETWEEN_SAVES = 300.0
"""Of the time, for the next start, while the system's clock is not set."""

Digests = list[str]


class StoredPart(BlobReader):
    """A part of a blob's file. It is read to its end even where the blob is removed meanwhile."""

    def __init__(self, file: BinaryIO, faults: StoreFaults, start: int, stop: int) -> None:
        self.nbytes = stop - start
        self._file = file
        self._faults = faults
        self._start = start
        self._lock = threading.Lock()  # a descriptor that is closed may be another file's at once

    def read(self, start: int, num_bytes: int) -> bytes:
        num_bytes = min(num_bytes, self.nbytes - start)
        with self._lock, self._faults.reading():
            return os.pread(self._file.fileno(), num_bytes, self._start + start)

    def close(self) -> None:
        with self._lock:
            self._file.close()


class SqliteStore(SessionStore):
    """See SessionStore. Durable: a kill or a loss of power loses nothing that was returned."""

    is_shared = False
    key_ledger = None

    def __init__(
        self,
        folder: Path,
        *,
        durable: bool = True,
        quotas: Quotas = lambda _: UNLIMITED,
        model: str = "",
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = seconds_since_boot,
    ) -> None:
        """model: a turn that was left goes on where it is the same. clock: unix seconds. monotonic:
        seconds from any origin. Without `durable` the sessions survive a kill, but neither a loss
        of power nor another server that removes the folders of dead processes.

        ConfigurationError: the folder cannot be used, or another process uses it.
        """
        self._wall = clock
        self._quotas = quotas
        self._faults = StoreFaults()
        self._holder = uuid4().hex
        self._lock = lock_folder(folder, "" if durable else TEMPORARY)
        with ExitStack() as stack:
            stack.callback(self._lock.release)
            with raise_unusable_folder(folder):
                set_damaged_aside(folder, INDEX, STATES)
                self._index = Database(folder / INDEX, durable=durable)
                stack.callback(self._index.close)
                self._blobs = Blobs(folder / STATES, durable=durable)
                recover(self._index, self._blobs)
                self._index.write(answers.drop_unanswered)
                last = self._index.read(queries.read_clock)
                self._clock = StoreClock(last, clock, monotonic)
                self.journal = SqliteJournal(
                    self._index, self._faults, self._holder, model, monotonic
                )
            stack.pop_all()  # opened without an error: `close` does it
        self._saved: ClockReading | None = None
        self._save_clock()

    def create(self, records: Sequence[NewSession], answer: Answer | None = None) -> Records:
        created = int(self._wall())
        with self._faults.writing(), ExitStack() as stack:
            staged = [
                None
                if new.snapshot is None
                else stack.enter_context(self._blobs.staged(new.snapshot, new.events))
                for new in records
            ]
            new_states = [
                None
                if blob is None
                else (blob.digest, new.position, blob.nbytes, new.context_policy, len(new.events))
                for new, blob in zip(records, staged, strict=True)
            ]
            pairs = [*zip(records, new_states, strict=True)]

            def insert(db: queries.Db) -> Records:
                with self._within_quotas(db, {new.owner for new in records}):
                    made = [queries.insert_session(db, *pair, created) for pair in pairs]
                _keep(db, answer, made)
                return made

            with self._adopted([blob for blob in staged if blob]):
                return self._index.write(insert)

    def acquire(
        self, session_id: str, ttl_seconds: float, owner: str | None = None
    ) -> tuple[Lease, SessionRecord]:
        now, monotonic = self._clock.now(), self._clock.monotonic()
        with self._faults.writing():
            return self._index.write_relaxed(
                lambda db: queries.acquire_lease(
                    db, session_id, owner, self._holder, ttl_seconds, now, monotonic
                )
            )

    def renew(self, lease: Lease, ttl_seconds: float) -> None:
        until = self._clock.monotonic() + ttl_seconds
        with self._faults.writing():
            self._index.write_relaxed(lambda db: queries.renew_lease(db, lease, until))

    def release(self, lease: Lease) -> None:
        def change(db: queries.Db) -> None:
            self.journal.end(db, lease)
            queries.release_lease(db, lease)

        with self._faults.writing():
            self._index.write_relaxed(change)
        self.journal.forget(lease)

    def head(self, session_id: str) -> int:
        return self.record(session_id).version

    def record(self, session_id: str) -> SessionRecord:
        now = self._clock.now()
        with self._faults.reading():
            return self._index.read(
                lambda db: queries.read_session(db, queries.session_key(db, session_id, now))
            )

    def get(self, digest: str) -> bytes:
        with self._faults.reading():
            return self._blobs.read(digest)

    def open_blob(self, digest: str, start: int, stop: int) -> BlobReader:
        with self._faults.reading():
            return StoredPart(self._blobs.open(digest), self._faults, start, stop)

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
        assignments = queries.COMMIT if keeps_lease else queries.COMMIT_AND_RELEASE
        with self._faults.writing(), self._blobs.staged(snapshot, events) as blob:
            state = blob.digest, position, blob.nbytes, context_policy, len(events)

            def change(db: queries.Db) -> tuple[SessionRecord, Digests]:
                row = queries.compare_and_set(db, lease, expected_version, assignments)
                seq, _, owner, *_ = row
                with self._within_quotas(db, {owner}):
                    dropped = queries.push_state(db, seq, state, max_checkpoints)
                changed = queries.to_record(db, row)
                _keep(db, answer, [changed])
                if not keeps_lease:
                    self.journal.end(db, lease)
                return changed, dropped

            with self._adopted([blob]):
                record, dropped = self._index.write(change)
                self._remove_unreferenced(dropped)
        if not keeps_lease:
            self.journal.forget(lease)
        return record

    def rewind(self, lease: Lease, expected_version: int) -> SessionRecord:
        def change(db: queries.Db) -> tuple[SessionRecord, Digests]:
            row = queries.compare_and_set(db, lease, expected_version, queries.REWIND)
            dropped = queries.pop_state(db, row[0])
            return queries.to_record(db, row), dropped

        with self._faults.writing(), self._index.lock:
            record, dropped = self._index.write(change)
            self._remove_unreferenced(dropped)
        return record

    def delete(self, session_id: str) -> None:
        now, monotonic = self._clock.now(), self._clock.monotonic()

        def change(db: queries.Db) -> Digests:
            seq = queries.session_key(db, session_id, now)
            queries.require_free(db, seq, monotonic)
            return queries.delete_session(db, seq)

        with self._faults.writing(), self._index.lock:
            self._remove_unreferenced(self._index.write(change))

    def list(self, owner: str, after: str | None, limit: int) -> tuple[Records, bool]:
        now = self._clock.now()
        with self._faults.reading():
            return self._index.read(lambda db: queries.list_sessions(db, owner, after, limit, now))

    def claim(self, owner: str, key: str, request: bytes, seconds: float) -> Claim | Claimed:
        new, now = Claim(owner, key, uuid4().hex), self._clock.now()
        with self._faults.writing():
            return self._index.write_relaxed(
                lambda db: answers.claim(db, new, request, now, seconds)
            )

    def keep_answer(self, claim: Claim, answer: bytes) -> None:
        with self._faults.writing():
            self._index.write(lambda db: answers.keep(db, claim, answer))

    def drop_claim(self, claim: Claim) -> None:
        with self._faults.writing():
            self._index.write_relaxed(lambda db: answers.drop(db, claim))

    def counts(self) -> StoreCounts:
        with self._faults.reading():
            [num_sessions] = self._index.read(
                lambda db: db.execute("SELECT count(*) FROM sessions").fetchone()
            )
        return StoreCounts(num_sessions, self._blobs.num_bytes)

    def now(self) -> float:
        return self._clock.now()

    def unix_time(self, moment: float) -> float:
        return self._clock.unix_time(moment)

    def expire(self, limit: int) -> Ids:
        """In one transaction: turns wait for it, so `limit` should be small.

        Also saves the time for the next start, now and then and when the system's clock was set.
        """
        self._save_clock_if_due()
        now, monotonic = self._clock.earliest(), self._clock.monotonic()

        def change(db: queries.Db) -> tuple[Ids, Digests]:
            found = queries.find_expired(db, now, monotonic, limit)
            dropped = [digest for seq, _ in found for digest in queries.delete_session(db, seq)]
            return [session_id for _, session_id in found], dropped

        with self._faults.writing(), self._index.lock:
            if self._index.read(lambda db: answers.has_expired(db, now)):
                self._index.write_relaxed(lambda db: answers.expire(db, now, limit))
            if not self._index.read(lambda db: queries.find_expired(db, now, monotonic, 1)):
                return []  # the usual case, without a write
            expired, dropped = self._index.write(change)
            self._remove_unreferenced(dropped)
        return expired

    def give_back(self) -> bool:
        with self._faults.writing():
            return self._index.give_back()

    def check_reachable(self) -> None:
        """A folder is always there; what it refuses, it refuses at once."""

    def free_reserve(self) -> None:
        with self._faults.writing():
            self._index.free_reserve()

    def close(self) -> None:
        """Nothing happens the second time."""
        try:
            self._save_clock()
            self._index.close()
        finally:
            self._lock.release()

    @contextmanager
    def _within_quotas(self, db: queries.Db, owners: Iterable[str]) -> Iterator[None]:
        """SessionQuotaError where owners have too much after the block, and more than before."""
        quotas = {owner: self._quotas(owner) for owner in owners}
        limited = {owner: quota for owner, quota in quotas.items() if quota != UNLIMITED}
        before = {owner: queries.usage_of(db, owner) for owner in limited}
        yield
        for owner, quota in limited.items():
            quota.check(before[owner], queries.usage_of(db, owner))

    def _save_clock_if_due(self) -> None:
        saved, reading = self._saved, self._clock.reading()
        if (
            saved is None
            or reading.time - saved.time >= SECONDS_BETWEEN_SAVES
            or abs((reading.wall - saved.wall) - (reading.time - saved.time)) > STEP_SECONDS
        ):
            self._save_clock()

    def _save_clock(self) -> None:
        """Where it cannot be saved the next start takes an older reading."""
        reading = self._clock.reading()
        with suppress(sqlite3.Error, OSError):
            self._index.write_relaxed(lambda db: queries.write_clock(db, reading))
            self._saved = reading

    @contextmanager
    def _adopted(self, blobs: Sequence[Staged]) -> Iterator[None]:
        """Give files their names for an index transaction; if it fails they are removed again.

        The lock is held across both, so that no file is removed between its adoption and its use.
        """
        with self._index.lock:
            try:
                for blob in blobs:
                    self._blobs.adopt(blob)
                yield
            except BaseException:
                self._remove_unreferenced(blob.digest for blob in blobs)
                raise

    def _remove_unreferenced(self, digests: Iterable[str]) -> None:
        """Nothing is removed where the index cannot say which; the next start does it."""
        if self._index.is_uncertain:
            return
        with suppress(sqlite3.Error, OSError):
            for digest in self._index.read(lambda db: queries.unreferenced(db, digests)):
                self._blobs.remove(digest)


def _keep(db: queries.Db, answer: Answer | None, records: Records) -> None:
    """Store the answer of a transaction that has stored these sessions. SessionMovedError."""
    if answer is not None:
        answers.require_kept(answers.keep(db, answer.claim, answer.make(records)))
