"""Sessions in a folder of this machine: an SQLite index, and a file for each snapshot.

Owns the order of writing: a file is whole and durable before the index refers to it, and is removed
after the index has forgotten it, all under the index's lock. Does not know what snapshots mean.

    <folder>/lock             held by the one process that the folder belongs to
    <folder>/index.sqlite     sessions, leases, which state is whose
    <folder>/states/ab/ab…    snapshots by digest
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

from cottention.engine.sessions.store import queries
from cottention.engine.sessions.store.blobs import Blobs, Staged
from cottention.engine.sessions.store.database import Database, set_damaged_aside
from cottention.engine.sessions.store.folder_lock import (
    TEMPORARY,
    take_folder,
    told_as_full,
    told_as_unusable,
)
from cottention.engine.sessions.store.protocol import (
    Ids,
    Lease,
    NewSession,
    Records,
    SessionRecord,
    SessionStore,
    StoreCounts,
)
from cottention.engine.sessions.store.recovery import check_up

INDEX, STATES = "index.sqlite", "states"

Digests = list[str]


class SqliteStore(SessionStore):
    """See SessionStore. Durable: a kill, or a loss of power, loses nothing of what returned."""

    def __init__(
        self, folder: Path, *, durable: bool = True, clock: Callable[[], float] = time.time
    ) -> None:
        """clock: unix seconds. Not durable: survives a kill, not a loss of power nor others that
        remove what dead processes left.

        ConfigurationError: the folder cannot be used, or another process uses it.
        """
        self._clock = clock
        self._owner = uuid4().hex
        self._lock = take_folder(folder, "" if durable else TEMPORARY)
        with ExitStack() as stack:
            stack.callback(self._lock.release)
            with told_as_unusable(folder):
                set_damaged_aside(folder, INDEX, STATES)
                self._index = Database(folder / INDEX, durable=durable)
                stack.callback(self._index.close)
                self._blobs = Blobs(folder / STATES, durable=durable)
                check_up(self._index, self._blobs)
            stack.pop_all()  # all is well: `close` does it

    def create(self, records: Sequence[NewSession]) -> Records:
        now = self._clock()
        with told_as_full(), ExitStack() as stack:
            snapshots = [
                None
                if new.snapshot is None
                else stack.enter_context(self._blobs.staged(new.snapshot))
                for new in records
            ]
            new_states = [
                None if staged is None else state(staged, new.position, new.context_policy)
                for new, staged in zip(records, snapshots, strict=True)
            ]
            pairs = [*zip(records, new_states, strict=True)]
            with self._adopted([staged for staged in snapshots if staged]):
                made = self._index.write(
                    lambda db: [queries.insert(db, *pair, now) for pair in pairs]
                )
        return made

    def acquire(self, session_id: str, ttl_seconds: float) -> Lease:
        now = self._clock()
        with told_as_full():
            return self._index.note(
                lambda db: queries.give(db, session_id, self._owner, now + ttl_seconds, now)
            )

    def renew(self, lease: Lease, ttl_seconds: float) -> None:
        until = self._clock() + ttl_seconds
        with told_as_full():
            self._index.note(lambda db: queries.prolong(db, lease, until))

    def release(self, lease: Lease) -> None:
        with told_as_full():
            self._index.note(lambda db: queries.end(db, lease))

    def head(self, session_id: str) -> int:
        return self.record(session_id).version

    def record(self, session_id: str) -> SessionRecord:
        now = self._clock()
        return self._index.read(
            lambda db: queries.record_of(db, queries.seq_of(db, session_id, now))
        )

    def get(self, digest: str) -> bytes:
        return self._blobs.read(digest)

    def put(
        self,
        lease: Lease,
        expected_version: int,
        snapshot: bytes,
        position: int,
        max_checkpoints: int,
        context_policy: str = "exact",
    ) -> SessionRecord:
        def change(db: queries.Db) -> tuple[SessionRecord, Digests]:
            seq = queries.advance(db, lease, expected_version)
            new = state(staged, position, context_policy)
            dropped = queries.push(db, seq, new, max_checkpoints)
            return queries.record_of(db, seq), dropped

        with told_as_full(), self._blobs.staged(snapshot) as staged, self._adopted([staged]):
            record, dropped = self._index.write(change)
            self._remove_unreferenced(dropped)
        return record

    def rewind(self, lease: Lease, expected_version: int) -> SessionRecord:
        def change(db: queries.Db) -> tuple[SessionRecord, Digests]:
            seq = queries.advance(db, lease, expected_version)
            dropped = queries.pop(db, seq)
            return queries.record_of(db, seq), dropped

        with told_as_full(), self._index.lock:
            record, dropped = self._index.write(change)
            self._remove_unreferenced(dropped)
        return record

    def delete(self, session_id: str) -> None:
        now = self._clock()

        def change(db: queries.Db) -> Digests:
            seq = queries.seq_of(db, session_id, now)
            queries.require_free(db, seq, now)
            return queries.remove(db, seq)

        with told_as_full(), self._index.lock:
            self._remove_unreferenced(self._index.write(change))

    def list(self, owner: str, after: str | None, limit: int) -> tuple[Records, bool]:
        now = self._clock()
        return self._index.read(lambda db: queries.page(db, owner, after, limit, now))

    def counts(self) -> StoreCounts:
        [num_sessions] = self._index.read(
            lambda db: db.execute("SELECT count(*) FROM sessions").fetchone()
        )
        return StoreCounts(num_sessions, self._blobs.num_bytes)

    def expire(self, now: float, limit: int) -> Ids:
        """In one transaction: turns wait for it, and so the limit should be small."""

        def change(db: queries.Db) -> tuple[Ids, Digests]:
            found = queries.expired(db, now, limit)
            dropped = [digest for seq, _ in found for digest in queries.remove(db, seq)]
            return [session_id for _, session_id in found], dropped

        with told_as_full(), self._index.lock:
            if not self._index.read(lambda db: queries.expired(db, now, 1)):
                return []  # nearly always, and nothing is written then
            expired, dropped = self._index.write(change)
            self._remove_unreferenced(dropped)
        return expired

    def free_room(self) -> None:
        with told_as_full():
            self._index.free_room()

    def close(self) -> None:
        """Nothing happens the second time."""
        self._index.close()
        self._lock.release()

    @contextmanager
    def _adopted(self, snapshots: Sequence[Staged]) -> Iterator[None]:
        """Files under their names, for an index transaction; without it they go again.

        The lock is held across both: nobody removes a file between its adoption and its use.
        """
        with self._index.lock:
            try:
                for staged in snapshots:
                    self._blobs.adopt(staged)
                yield
            except BaseException:
                self._remove_unreferenced(staged.digest for staged in snapshots)
                raise

    def _remove_unreferenced(self, digests: Iterable[str]) -> None:
        if self._index.is_uncertain:
            return
        for digest in self._index.read(lambda db: queries.unreferenced(db, digests)):
            self._blobs.remove(digest)


def state(staged: Staged, position: int, context_policy: str) -> queries.State:
    """A row of a new snapshot."""
    return staged.digest, position, staged.nbytes, context_policy
