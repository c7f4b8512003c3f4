"""Any sequence of changes against the same in plain dictionaries, over restarts."""

from dataclasses import dataclass
from hashlib import sha256
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cottention.engine.errors import NothingToRewindError, SessionBusyError, SessionMovedError
from cottention.engine.sessions.store import Lease, NewSession
from tests.engine.postgres import Postgres
from tests.engine.sessions.store.backends import Backend, PostgresBackend, SqliteBackend

SNAPSHOTS = st.binary(min_size=1, max_size=2)  # few: equal bytes are frequent
EVENTS = b"log"
"""A blob of more than two bytes ends with these."""


@dataclass
class Twin:
    """What a session should be; its blobs, the head last.

    over: the fence up to which a restart has ended all leases.
    """

    blobs: list[bytes]
    version: int = 1
    lease: Lease | None = None
    fence: int = 0
    over: int = 0
    was_interrupted: bool = False


class StoreMachine(RuleBasedStateMachine):
    """Sessions made, changed, forked, rewound and deleted."""

    sessions = Bundle("sessions")
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.backend = self.new_backend()
        self.store = self.backend.open()
        self.twins: dict[str, Twin] = {}
        self.num_restarts = 0

    def teardown(self) -> None:
        self.store.close()
        self.backend.remove()

    def new_backend(self) -> Backend:
        return SqliteBackend()

    @rule(target=sessions, raw=SNAPSHOTS)
    def make(self, raw: bytes) -> str:
        [record] = self.store.create([NewSession("a", len(raw), snapshot=raw)])
        self.twins[record.id] = Twin([raw])
        return record.id

    @rule(target=sessions, session_id=sessions)
    def fork(self, session_id: str) -> str:
        source = self.store.record(session_id)
        new = NewSession("a", source.position, head=source.head, checkpoints=source.checkpoints)
        [record] = self.store.create([new])
        self.twins[record.id] = Twin([*self.twins[session_id].blobs])
        return record.id

    @rule(target=leases, session_id=sessions, ttl=st.sampled_from([0.0, 1000.0]))
    def acquire(self, session_id: str, ttl: float) -> Lease:
        """A ttl of nothing is a holder that will be taken over."""
        twin = self.twins[session_id]
        if twin.lease is not None:
            with pytest.raises(SessionBusyError):
                self.store.acquire(session_id, ttl)
            return twin.lease
        lease, _ = self.store.acquire(session_id, ttl)
        assert lease.fence > twin.fence
        assert lease.version == twin.version
        twin.fence = lease.fence
        twin.lease = lease if ttl else None
        return lease

    def is_current(self, lease: Lease) -> bool:
        twin = self.twins.get(lease.session_id)
        return twin is not None and twin.lease == lease

    def is_old(self, lease: Lease) -> bool:
        """Surely no right: its session is gone, a later lease was given, or a restart ended it."""
        twin = self.twins.get(lease.session_id)
        return twin is None or twin.fence > lease.fence or twin.over >= lease.fence

    @rule(lease=leases, raw=SNAPSHOTS, keep=st.integers(0, 2), behind=st.integers(0, 1))
    def put(self, lease: Lease, raw: bytes, keep: int, behind: int) -> None:
        if self.is_current(lease):
            twin = self.twins[lease.session_id]
            if behind:
                with pytest.raises(SessionMovedError):
                    self.store.commit(
                        lease, twin.version - 1, raw, len(raw), keep, keeps_lease=True
                    )
                return
            self.store.commit(lease, twin.version, raw, len(raw), keep, keeps_lease=True)
            twin.blobs = [*twin.blobs, raw][-keep - 1 :]
            twin.version += 1
            twin.was_interrupted = False
        elif self.is_old(lease):
            twin = self.twins.get(lease.session_id, Twin([]))
            with pytest.raises(SessionMovedError):
                self.store.commit(lease, twin.version, raw, len(raw), keep, keeps_lease=True)

    @rule(lease=leases, raw=SNAPSHOTS, events=st.sampled_from([b"", EVENTS]))
    def commit(self, lease: Lease, raw: bytes, events: bytes) -> None:
        if not self.is_current(lease):
            return
        twin, blob = self.twins[lease.session_id], raw + events
        self.store.commit(lease, twin.version, raw, len(blob), 2, events=events)
        twin.blobs = [*twin.blobs, blob][-3:]
        twin.version += 1
        twin.was_interrupted = False
        twin.lease = None

    @rule(lease=leases)
    def rewind(self, lease: Lease) -> None:
        if not self.is_current(lease):
            return
        twin = self.twins[lease.session_id]
        if len(twin.blobs) == 1:
            with pytest.raises(NothingToRewindError):
                self.store.rewind(lease, twin.version)
            return
        self.store.rewind(lease, twin.version)
        twin.blobs.pop()
        twin.version += 1

    @rule(lease=consumes(leases))
    def release(self, lease: Lease) -> None:
        self.store.release(lease)
        if self.is_current(lease):
            self.twins[lease.session_id].lease = None

    @rule(session_id=consumes(sessions))
    def delete(self, session_id: str) -> None:
        if self.twins[session_id].lease is not None:
            with pytest.raises(SessionBusyError):
                self.store.delete(session_id)
            self.store.release(self.twins[session_id].lease)
        self.store.delete(session_id)
        del self.twins[session_id]

    @precondition(lambda self: self.num_restarts < 2)  # they take most of the time
    @rule()
    def restart(self) -> None:
        self.num_restarts += 1
        self.store.close()
        self.store = self.backend.open()
        for session_id, twin in self.twins.items():
            twin.was_interrupted = self.store.record(session_id).was_interrupted
            if twin.lease is not None:
                assert twin.was_interrupted or twin.lease.version < twin.version
                twin.over = twin.fence
                twin.lease = None

    @invariant()
    def agrees(self) -> None:
        kept: set[bytes] = set()
        for session_id, twin in self.twins.items():
            record = self.store.record(session_id)
            digests = [sha256(raw).hexdigest() for raw in twin.blobs]
            assert [*record.checkpoints, record.head] == digests
            assert [self.store.get(digest) for digest in digests] == twin.blobs
            events = EVENTS if len(twin.blobs[-1]) > 2 else b""
            assert record.split(twin.blobs[-1])[1] == events
            assert record.version == twin.version
            assert record.position == record.nbytes == len(twin.blobs[-1])
            assert record.was_interrupted == twin.was_interrupted
            kept.update(twin.blobs)
        counts = self.store.counts()
        assert (counts.num_sessions, counts.blob_bytes) == (
            len(self.twins),
            sum(map(len, kept)),
        )


class AtLength(StoreMachine):
    """More of the same."""


class OverPostgres(StoreMachine):
    """The same in a database, whose server the test sets."""

    server: ClassVar[Postgres]

    def new_backend(self) -> Backend:
        return PostgresBackend(self.server)


@pytest.mark.cluster
def test_any_sequence_of_changes_over_postgres(postgres: Postgres) -> None:
    OverPostgres.server = postgres
    few = settings(TestStore.settings, max_examples=10)
    run_state_machine_as_test(OverPostgres, settings=few)


TestStore = StoreMachine.TestCase
TestStoreAtLength = pytest.mark.slow(AtLength.TestCase)
TestStore.settings = settings(
    max_examples=15,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestStoreAtLength.settings = settings(TestStore.settings, max_examples=80)
