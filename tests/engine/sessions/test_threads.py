"""Eight threads on one `SessionManager`, over SQLite: in the end every session is what it was made.


A value is named by a number of its own, its count of tokens, so that what a session holds at a
version can be held against what the threads noted of that version: versions order what happened.
"""

import itertools
import random
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytest
import torch

from cottention.engine.errors import NothingToRewindError, SessionBusyError, SessionNotFoundError
from cottention.engine.sessions.fingerprint import Fingerprint
from cottention.engine.sessions.manager import SessionManager
from cottention.engine.sessions.snapshot import SnapshotCodec
from cottention.engine.sessions.store import SqliteStore
from cottention.engine.sessions.types import Session
from cottention.engine.state.context_window import context_schedules
from cottention.engine.state.session_state import SessionState
from cottention.engine.state.spec import StateSpec
from tests.engine.making import ATTENTIONS, small_spec, state_of

WINDOW = 8
NUM_THREADS, NUM_VERBS = 8, 80
MAX_CHECKPOINTS = 2
REFUSALS = (SessionBusyError, SessionNotFoundError, NothingToRewindError)


@dataclass(frozen=True)
class Values:
    """What sessions hold, by number."""

    spec: StateSpec

    @cached_property
    def codec(self) -> SnapshotCodec:
        prints = Fingerprint("w", "t", "c", "l")
        return SnapshotCodec(prints, self.spec, 1 << 20, context_schedules(WINDOW), WINDOW)

    def state(self, n: int) -> SessionState:
        """Of n tokens, in rows that tell n."""
        return state_of(self.spec, n, WINDOW)

    def raw(self, n: int) -> bytes:
        """The same as a snapshot."""
        return self.codec.encode(self.state(n))


@dataclass
class Noted:
    """What the threads saw. made: value by session and version. seen: values without a version."""

    made: dict[tuple[str, int], int] = field(default_factory=dict)
    seen: list[tuple[str, int]] = field(default_factory=list)
    parents: dict[int, int] = field(default_factory=dict)
    rewound: list[tuple[str, int]] = field(default_factory=list)
    deleted: set[str] = field(default_factory=set)
    names: list[str] = field(default_factory=list)
    faults: list[BaseException] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def note(self, session: Session) -> None:
        assert self.made.setdefault((session.id, session.version), session.position) == (
            session.position
        ), "a version has one value"

    def add(self, session: Session) -> None:
        self.note(session)
        self.names.append(session.id)


class Somebody:
    """One thread: verbs by chance, on sessions that all threads share."""

    def __init__(self, sessions: SessionManager, values: Values, noted: Noted, seed: int) -> None:
        self._sessions = sessions
        self._values = values
        self._noted = noted
        self._chance = random.Random(seed)

    def run(self) -> None:
        verbs = [self._turn] * 6 + [self._rewind] * 2 + [self._fork, self._open, self._delete]
        verbs += [self._abandon, self._export, self._look]
        try:
            for _ in range(NUM_VERBS):
                try:
                    self._chance.choice(verbs)(self._chance.choice(self._noted.names[-12:]))
                except REFUSALS:
                    continue
        except BaseException as fault:
            self._noted.faults.append(fault)

    def _turn(self, name: str) -> None:
        turn = self._sessions.begin("a", name)
        n = next(self._noted.numbers)
        self._noted.parents[n] = turn.state.num_tokens
        expected = self._values.state(turn.state.num_tokens)
        assert all(map(torch.equal, turn.state.rows, expected.rows))
        self._noted.note(turn.session)
        self._noted.note(self._sessions.commit(turn, self._values.state(n)))

    def _abandon(self, name: str) -> None:
        turn = self._sessions.begin("a", name)
        self._noted.note(turn.session)
        self._sessions.abandon(turn)

    def _rewind(self, name: str) -> None:
        session = self._sessions.rewind("a", name)
        self._noted.note(session)
        self._noted.rewound.append((name, session.version))

    def _fork(self, name: str) -> None:
        for fork in self._sessions.fork("a", name, self._chance.randint(1, 2)):
            self._noted.seen.append((name, fork.position))
            self._noted.add(fork)

    def _open(self, _: str) -> None:
        state = self._values.state(next(self._noted.numbers))
        self._noted.add(self._sessions.open("a", state, {}, None))

    def _delete(self, name: str) -> None:
        if self._chance.random() < 0.3:
            self._sessions.delete("a", name)
            self._noted.deleted.add(name)

    def _export(self, name: str) -> None:
        raw = self._sessions.export("a", name).raw
        value = self._values.codec.decode(raw)
        assert self._values.raw(value.num_tokens) == raw
        self._noted.seen.append((name, value.num_tokens))

    def _look(self, name: str) -> None:
        self._noted.note(self._sessions.find("a", name))
        self._sessions.events("a", name)
        self._sessions.page("a", None, 5)
        self._sessions.maintain()
        assert self._sessions.sizes().num_resident <= NUM_THREADS


def all_at_once(sessions: SessionManager, values: Values, seed: int) -> Noted:
    noted = Noted()
    for _ in range(4):
        noted.add(sessions.open("a", values.state(next(noted.numbers)), {}, None))
    threads = [
        threading.Thread(target=Somebody(sessions, values, noted, NUM_THREADS * seed + n).run)
        for n in range(NUM_THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert noted.faults == []
    return noted


@pytest.mark.parametrize(("seed", "attention"), [*enumerate(ATTENTIONS)])
def test_threads_on_one_store(tmp_path: Path, seed: int, attention: str) -> None:
    store, values = SqliteStore(tmp_path, durable=False), Values(small_spec(attention))
    budget = 6 * values.state(1).nbytes
    sessions = SessionManager(
        store, values.codec, memory_bytes=budget, max_checkpoints=MAX_CHECKPOINTS, is_durable=True
    )
    noted = all_at_once(sessions, values, seed)
    alive = set(noted.names) - noted.deleted
    assert alive
    check_history(noted)
    for name in alive:
        check_session(sessions, values, noted, name)
    for name in noted.deleted:
        with pytest.raises(SessionNotFoundError):
            sessions.find("a", name)
    sizes = sessions.sizes()
    assert (sizes.num_resident, sizes.num_unsaved) == (0, 0)
    assert sizes.num_parked + sizes.num_stored == len(alive)
    assert sizes.parked_bytes <= budget
    assert sizes.stored_bytes == check_files(tmp_path)
    sessions.close()


def check_history(noted: Noted) -> None:
    """No version is missing, whoever made it; a rewind goes back to where a turn began."""
    for name in set(noted.names):
        versions = sorted(version for other, version in noted.made if other == name)
        assert versions == list(range(1, len(versions) + 1))
    for name, version in noted.rewound:
        before = noted.made[name, version - 1]
        assert noted.made[name, version] == noted.parents[before]
    values = {(name, value) for (name, _), value in noted.made.items()}
    assert set(noted.seen) <= values


def check_session(sessions: SessionManager, values: Values, noted: Noted, name: str) -> None:
    """It holds what its last version was made, nobody has it, and its checkpoints are its past."""
    session = sessions.find("a", name)
    assert session.version == max(version for other, version in noted.made if other == name)
    value = noted.made[name, session.version]
    assert sessions.export("a", name).raw == values.raw(value)
    assert session.residence != "resident"
    for _ in range(session.num_checkpoints):
        value = noted.parents[value]
        assert sessions.rewind("a", name).position == value
        assert sessions.export("a", name).raw == values.raw(value)


def check_files(folder: Path) -> int:
    """No lease is left, and every file belongs to a session; their bytes."""
    with sqlite3.connect(folder / "index.sqlite") as db:
        assert db.execute("SELECT * FROM sessions WHERE lease_owner IS NOT NULL").fetchall() == []
        digests = {digest for (digest,) in db.execute("SELECT digest FROM states")}
    db.close()
    files = {path.name: path.stat().st_size for path in (folder / "states").glob("??/*")}
    assert files.keys() == digests
    assert not any((folder / "states" / "new").iterdir())
    return sum(files.values())
