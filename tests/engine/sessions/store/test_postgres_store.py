"""What is peculiar to the store in PostgreSQL: replicas, networks that fail, restarts, poolers."""

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest

from cottention.engine.errors import (
    ConfigurationError,
    SessionBusyError,
    SessionMovedError,
    StoreUnavailableError,
)
from cottention.engine.sessions.store import NewSession, SessionRecord, SessionStore
from cottention.engine.sessions.store.postgres import queries
from cottention.engine.sessions.store.postgres.address import check_address, read_password
from cottention.engine.sessions.store.postgres.blobs import Blob, inflated
from cottention.engine.sessions.store.postgres.functions import NUM_TURNS
from cottention.engine.sessions.store.postgres.store import PostgresStore
from cottention.engine.sessions.store.protocol import UNLIMITED, Quota
from tests.engine.postgres import PASSWORD, Postgres, running_pgbouncer, running_postgres
from tests.engine.sessions.store.backends import PostgresBackend
from tests.engine.tcp_proxy import Fault, proxied

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[4]


@pytest.fixture
def backend(postgres: Postgres) -> PostgresBackend:
    return PostgresBackend(postgres)


@contextmanager
def opened(url: str) -> Iterator[PostgresStore]:
    with closing(PostgresStore(url, password=PASSWORD)) as store:
        yield store


def make(store: SessionStore, snapshot: bytes = b"one") -> SessionRecord:
    [record] = store.create([NewSession("a", 1, snapshot=snapshot)])
    return record


def turn(store: SessionStore, session_id: str, snapshot: bytes) -> SessionRecord:
    lease, _ = store.acquire(session_id, 60)
    return store.commit(lease, lease.version, snapshot, len(snapshot), 2)


class Process:
    """A replica in its own process, that has leased a session."""

    def __init__(self, url: str, session_id: str) -> None:
        command = [sys.executable, "-m", "tests.engine.postgres_process", url, session_id]
        self.popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PGPASSWORD": PASSWORD},
        )
        assert self.said() == "leased True"

    def said(self) -> str:
        assert self.popen.stdout
        return self.popen.stdout.readline().strip()

    def ask(self, line: str) -> str:
        assert self.popen.stdin
        print(line, file=self.popen.stdin, flush=True)
        return self.said()


@pytest.fixture
def process_of() -> Iterator[Callable[[str, str], Process]]:
    started: list[Process] = []

    def start(url: str, session_id: str) -> Process:
        started.append(Process(url, session_id))
        return started[-1]

    yield start
    for each in started:
        each.popen.kill()
        each.popen.communicate()


def test_the_session_of_a_replica_that_was_killed_is_taken_over(
    backend: PostgresBackend, postgres: Postgres, process_of: Callable[[str, str], Process]
) -> None:
    """When its life is over; the turn that it ran is as if it had not begun."""
    with closing(backend.open()) as store:
        record = make(store)
        holder = process_of(postgres.url, record.id)
        with pytest.raises(SessionBusyError):
            store.acquire(record.id, 60)
        holder.popen.kill()
        holder.popen.wait()
        # until its life ends it counts as alive, and for the first beats it is not even late
        lease, found = None, record
        while lease is None:
            try:
                lease, found = store.acquire(record.id, 60)
            except SessionBusyError:
                time.sleep(0.05)
        assert (found.was_interrupted, found.version, lease.fence) == (True, 1, 2)
        assert not store.commit(lease, 1, b"two", 2, 2).was_interrupted


def test_a_replica_that_slept_past_its_life_writes_nothing(
    backend: PostgresBackend, postgres: Postgres, process_of: Callable[[str, str], Process]
) -> None:
    with closing(backend.open()) as store:
        taken, left = make(store, b"taken"), make(store, b"left")
        holders = [process_of(postgres.url, each.id) for each in (taken, left)]
        for holder in holders:
            holder.popen.send_signal(signal.SIGSTOP)
        lease = None
        while lease is None:
            try:
                lease, _ = store.acquire(taken.id, 60)
            except SessionBusyError:
                time.sleep(0.05)
        store.commit(lease, 1, b"another", 7, 2)
        for holder in holders:
            holder.popen.send_signal(signal.SIGCONT)
        assert [holder.ask("commit") for holder in holders] == ["moved", "committed 2"]
        assert store.get(store.record(taken.id).head) == b"another"


@pytest.mark.parametrize("fault", ["lose request", "lose answer", "swallow"])
@pytest.mark.parametrize("verb", ["commit", "create", "rewind", "delete", "acquire"])
def test_what_the_network_cuts_is_done_once(
    backend: PostgresBackend,
    postgres: Postgres,
    verb: str,
    fault: Fault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The connection breaks before the database has the message, or after it has done it."""
    triggers = {"acquire": b"cottention.acquire_v1", "commit": b"cottention.commit_v1"}
    with (
        proxied(postgres.port) as proxy,
        closing(backend.open()) as other,
        opened(postgres.url.replace(str(postgres.port), str(proxy.port))) as store,
    ):
        record = turn(store, make(store).id, b"two")
        if verb in ("commit", "rewind"):
            lease, _ = store.acquire(record.id, 60)
        # not before the tables are made, which takes longer on a busy machine
        monkeypatch.setattr(
            "cottention.engine.sessions.store.postgres.connections.ATTEMPT_SECONDS", 1.0
        )
        # the heartbeats' own transactions would take the fault
        store._replica._stopping.set()
        store._replica._thread.join()
        proxy.arm(triggers.get(verb, b"COMMIT"), fault)
        if verb == "commit":
            found = store.commit(lease, 2, b"three", 3, 2)
            assert (found.version, found.position) == (3, 3)
        elif verb == "create":
            [found] = store.create([NewSession("a", 1, snapshot=b"other")])
            assert proxy.num_faults == 1
            assert [each.id for each in other.list("a", None, 9)[0]] == [found.id, record.id]
            assert other.counts().blob_bytes == 11
            return
        elif verb == "rewind":
            found = store.rewind(lease, 2)
            assert (found.version, found.position) == (3, 1)
            store.release(lease)
        elif verb == "delete":
            store.delete(record.id)
            assert proxy.num_faults == 1
            assert other.counts().num_sessions == 0
            return
        else:
            lease, found = store.acquire(record.id, 60)
            store.release(lease)
        assert proxy.num_faults == 1
        assert other.record(record.id) == found
        other.release(other.acquire(record.id, 60)[0])


def test_a_commit_in_doubt_is_found_after_turns_of_others(backend: PostgresBackend) -> None:
    """Their states have taken the place of its own; the session is as the commit has left it."""
    with closing(backend.open()) as store:
        record = make(store)
        lease, _ = store.acquire(record.id, 60)
        blob = Blob.of(b"two", b"", 2, "renew")

        def find(turn: int) -> SessionRecord | None:
            stored = store._connections.statement(
                lambda db: queries.find_commit(db, lease, 1, blob, turn)
            )
            return stored and stored.record

        done = store.commit(lease, 1, b"two", 2, 0, "renew")
        [[turns]] = backend.execute("SELECT turns FROM cottention.sessions")
        assert find(turns[0]) == done
        for n in range(NUM_TURNS - 1):
            other, _ = store.acquire(record.id, 60)
            store.commit(other, other.version, b"%d" % n, 3, 0)
            assert find(turns[0]) == done
            assert find(turns[0] + 1) is None
        turn(store, record.id, b"one too many")
        with pytest.raises(StoreUnavailableError, match="may be among"):
            find(turns[0])


def test_a_store_that_cannot_be_reached_says_so_and_recovers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = "cottention.engine.sessions.store.postgres"
    monkeypatch.setattr(f"{where}.connections.RETRY_SECONDS", 0.5)
    monkeypatch.setattr(f"{where}.store.HOLD_SECONDS", 0.5)
    with running_postgres() as server, opened(server.url) as store:
        record = make(store)
        lease, _ = store.acquire(record.id, 60)
        server.stop(signal.SIGQUIT)
        with caplog.at_level(logging.WARNING):
            for call in (
                partial(store.record, record.id),
                partial(store.commit, lease, 1, b"two", 2, 2),
            ):
                with pytest.raises(StoreUnavailableError) as caught:
                    call()
                assert PASSWORD not in str(caught.value)
        assert PASSWORD not in caplog.text
        server.start()
        monkeypatch.setattr(f"{where}.store.HOLD_SECONDS", 60.0)
        assert store.commit(lease, 1, b"two", 2, 2).version == 2


def test_turns_outlast_a_crash_of_the_database() -> None:
    """Each is answered once, whatever the crash has cut; what was answered is there."""
    with running_postgres(is_durable=True) as server, opened(server.url) as store:
        made = [make(store, b"%d" % n) for n in range(8)]
        enough = threading.Event()

        def turns(record: SessionRecord) -> int:
            version = 1
            while not enough.is_set():
                try:
                    lease, found = store.acquire(record.id, 60)
                except StoreUnavailableError:
                    continue
                assert found.version == version
                version = store.commit(
                    lease, version, b"%s %d" % (record.id.encode(), version), version, 1
                ).version
            return version

        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(turns, record) for record in made]
            for _ in range(3):
                before = sum(store.record(record.id).version for record in made)
                server.stop(signal.SIGQUIT)
                server.start()
                while True:
                    try:
                        now = sum(store.record(record.id).version for record in made)
                    except StoreUnavailableError:
                        continue
                    if now > before + 16:
                        break
            enough.set()
            versions = [each.result(60) for each in running]
        for record, version in zip(made, versions, strict=True):
            found = store.record(record.id)
            assert found.version == version
            assert store.get(found.head) == b"%s %d" % (record.id.encode(), version - 1)


@pytest.mark.usefixtures("backend")
def test_many_replicas_through_pgbouncer(postgres: Postgres) -> None:
    """Transactions of all go over two connections, whose state belongs to nobody."""
    with (
        running_pgbouncer(postgres, pool_size=2) as url,
        ThreadPoolExecutor(6) as pool,
        opened(url) as one,
        opened(url) as two,
        opened(url) as three,
    ):
        made = [make(one, b"%d" % n) for n in range(6)]

        def turns(n: int) -> None:
            stores = (one, two, three)
            for k in range(10):
                last = turn(stores[(n + k) % 3], made[n].id, b"%d %d" % (n, k))
                assert last.version == k + 2

        [*pool.map(turns, range(6))]
        assert {three.head(record.id) for record in made} == {11}


def test_replicas_that_start_at_once_make_the_tables_once(
    backend: PostgresBackend, postgres: Postgres
) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = [*pool.map(lambda _: backend.open(), range(4))]
    make(stores[0])
    assert [store.counts().num_sessions for store in stores] == [1] * 4
    for store in stores:
        store.close()
    backend.execute("INSERT INTO cottention.migrations (version) VALUES (99)")
    with opened(postgres.url) as older:  # a later release has added something
        assert older.counts().num_sessions == 1


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://a:{PASSWORD}@h/d",
        f"postgresql://a@h/d?password={PASSWORD}",
        "postgresql://a@h/d?sslpassword=x",
        "postgresql://a:@h/d",
        f"host=h password={PASSWORD}",
        "mysql://a@h/d",
        "",
    ],
)
def test_an_address_with_a_password_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_address(url)
    assert PASSWORD not in str(caught.value)
    assert caught.value.__cause__ is None


def test_passwords_come_from_a_file_a_variable_or_libpq_s_own_file(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\nanother line\n")
    PostgresStore(postgres.url, password=read_password(str(file))).close()
    with pytest.raises(ConfigurationError, match="password") as caught:
        PostgresStore(postgres.url, password="wrong one")
    assert "wrong one" not in str(caught.value)
    file.write_text("")
    with pytest.raises(ConfigurationError, match="no password"):
        read_password(str(file))
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_password(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setenv("PGPASSWORD", PASSWORD)
        PostgresStore(postgres.url).close()
    file.write_text(f"*:*:*:*:{PASSWORD}\n")
    file.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(file))
    PostgresStore(postgres.url).close()


def test_blobs_come_back_whether_deflating_makes_them_shorter_or_not() -> None:
    """One whose deflated form is as long as itself was once read as what it is not."""
    rng = random.Random(1)
    ends = set()
    for length in range(2000):
        raw = bytes(rng.choices(b"0123456789 abcdef", k=length // 10))
        stored = Blob.of(raw, b"", 1, "exact").deflated()
        ends.add(len(zlib.compress(raw, 1)) - len(raw))
        assert inflated(stored, len(raw)) == raw
    assert min(ends) < 0 < max(ends)
    assert 0 in ends


@pytest.mark.parametrize("quotas", [UNLIMITED, Quota(max_sessions=9, max_bytes=9999)])
def test_a_blob_takes_the_row_of_one_that_goes_unless_others_have_it(
    backend: PostgresBackend, quotas: Quota
) -> None:
    """In one statement and as a part of a transaction: a session would lose its state, or a state
    would stay for ever."""

    def rows() -> list[tuple[bytes, int]]:
        statement = "SELECT bytes, refs FROM cottention.blobs ORDER BY bytes"
        return [(bytes(raw), refs) for raw, refs in backend.execute(statement)]

    def advance(session_id: str, snapshot: bytes) -> None:
        lease, found = store.acquire(session_id, 60)
        store.commit(lease, found.version, snapshot, len(snapshot), 0)
        assert store.get(store.record(session_id).head) == snapshot

    with closing(backend.open(lambda _: quotas)) as store:
        one, two = make(store, b"1").id, make(store, b"2").id
        advance(one, b"same")
        assert rows() == [(b"2", 1), (b"same", 1)]
        advance(two, b"same")
        assert rows() == [(b"same", 2)]
        advance(two, b"same")
        assert rows() == [(b"same", 2)]
        advance(one, b"other")
        assert rows() == [(b"other", 1), (b"same", 1)]
        advance(two, b"other")
        assert rows() == [(b"other", 2)]
        store.delete(one)
        assert store.get(store.record(two).head) == b"other"
        store.delete(two)
        assert rows() == []


def test_the_fence_is_what_refuses_a_late_writer(backend: PostgresBackend) -> None:
    """Two replicas in one process; the first one's life ends without its knowledge."""
    with closing(backend.open()) as one, closing(backend.open()) as two:
        record = make(one)
        lease, _ = one.acquire(record.id, 60)
        one._replica._stopping.set()
        one._replica._thread.join()
        backend.execute(
            "UPDATE cottention.replicas SET until = '-infinity' WHERE id = %s", [one.replica_id]
        )
        assert two.record(record.id).was_interrupted
        taken, found = two.acquire(record.id, 60)
        assert found.was_interrupted
        with pytest.raises(SessionMovedError):
            one.commit(lease, 1, b"late", 4, 2)
        with pytest.raises(SessionMovedError):
            one.renew(lease, 60)
        one.release(lease)
        with pytest.raises(SessionBusyError):
            one.acquire(record.id, 60)
        assert two.commit(taken, 1, b"two", 2, 2).version == 2
