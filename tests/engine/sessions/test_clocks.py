"""Lifetimes, order and leases while the system's clock is set forward and back by hours.

Without the store's own time a jump that is undone would delete sessions that had hours to live.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cottention.engine.errors import SessionBusyError, SessionMovedError, SessionNotFoundError
from cottention.engine.sessions.manager import LEASE_SECONDS, SessionManager
from cottention.engine.sessions.store import SqliteStore
from tests.engine.sessions.kept import OWNER, WINDOW, kept, new, text_of, turn

HOUR, YEAR = 3600.0, 365 * 24 * 3600.0
JUMPS = [-56 * YEAR, -30 * HOUR, -2 * HOUR, 2 * HOUR, 30 * HOUR, YEAR]


@dataclass
class Clocks:
    """The system's clock, which can be set, and one that only passes."""

    wall: float = 1_800_000_000.25
    monotonic: float = 77.5

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds

    def set_by(self, seconds: float) -> None:
        self.wall += seconds


Opener = Callable[[], SessionManager]


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def opened(tmp_path: Path, clocks: Clocks) -> Iterator[Opener]:
    """Opens the folder; what was open is closed before. The monotonic clock begins anew.

    A process that is open while the clock is set may see it, also as it is closed.
    """
    last: list[SessionManager] = []

    def open_() -> SessionManager:
        for sessions in last:
            sessions.close()
        clocks.monotonic = 5.0
        sessions = kept(tmp_path, clock=lambda: clocks.wall, monotonic=lambda: clocks.monotonic)
        last[:] = [sessions]
        return sessions

    yield open_
    for sessions in last:
        sessions.close()


def is_there(sessions: SessionManager, session_id: str) -> bool:
    try:
        sessions.find(OWNER, session_id)
    except SessionNotFoundError:
        assert session_id not in [each.id for each in sessions.page(OWNER, None, 100)[0]]
        return False
    return True


def num_kept(sessions: SessionManager) -> int:
    """Sessions that are not deleted, expired ones among them."""
    return sessions._store.counts().num_sessions


def killed(sessions: SessionManager) -> None:
    """End as a killed process does: nothing more is written."""
    store = sessions._store
    assert isinstance(store, SqliteStore)
    store._index.close()
    store._lock.release()


@pytest.mark.parametrize("jump", JUMPS)
@pytest.mark.parametrize("is_undone", [True, False])
def test_a_jump_while_a_process_runs_changes_no_lifetime(
    opened: Opener, clocks: Clocks, jump: float, is_undone: bool
) -> None:
    sessions = opened()
    session_id = new(sessions, ttl=3 * HOUR)
    begun = sessions.begin(OWNER, session_id)
    clocks.set_by(jump)
    assert not sessions.maintain()
    sessions.commit(begun, begun.state.extended(b"d", (), WINDOW))
    during = new(sessions, ttl=3 * HOUR)
    clocks.pass_(1.5 * HOUR)
    sessions.maintain()
    turn(sessions, session_id)
    clocks.set_by(-jump if is_undone else 0)
    clocks.pass_(1.4 * HOUR)
    sessions.maintain()
    assert is_there(sessions, session_id)
    assert is_there(sessions, during)
    assert text_of(sessions, session_id) == b"abcdx"
    clocks.pass_(0.2 * HOUR)
    assert not is_there(sessions, session_id)
    assert not is_there(sessions, during)
    sessions.maintain()
    assert num_kept(sessions) == 0


@pytest.mark.parametrize("jump", JUMPS)
def test_what_is_shown_is_by_the_system_s_clock(
    opened: Opener, clocks: Clocks, jump: float
) -> None:
    sessions = opened()
    session_id = new(sessions, ttl=3 * HOUR)
    [fork] = sessions.fork(OWNER, session_id, 1)
    assert sessions.find(OWNER, session_id).expires_at == clocks.wall + 3 * HOUR
    clocks.pass_(HOUR)
    clocks.set_by(jump)
    later = sessions.open(OWNER, sessions.begin(OWNER, fork.id).state, {}, HOUR)
    assert later.created == int(clocks.wall)
    for each, hours in ((session_id, 2), (fork.id, 2), (later.id, 1)):
        shown = sessions.find(OWNER, each).expires_at
        assert shown == pytest.approx(clocks.wall + hours * HOUR, abs=1.0)


def test_newest_first_is_by_order_and_not_by_time(opened: Opener, clocks: Clocks) -> None:
    sessions, made = opened(), []
    for jump in (*JUMPS, 0):
        made.append(new(sessions))
        clocks.set_by(jump)
        clocks.pass_(10)
    sessions = opened()
    made.append(new(sessions))
    seen: list[str] = []
    has_more = True
    while has_more:
        page, has_more = sessions.page(OWNER, seen[-1] if seen else None, 3)
        seen += [each.id for each in page]
    assert seen == made[::-1]


@pytest.mark.parametrize("jump", JUMPS)
def test_a_lease_lasts_as_long_as_it_says(opened: Opener, clocks: Clocks, jump: float) -> None:
    sessions = opened()
    renewed, forgotten = new(sessions), new(sessions)
    running = sessions.begin(OWNER, renewed)
    dead = sessions.begin(OWNER, forgotten)
    clocks.set_by(jump)
    for session_id in (renewed, forgotten):
        with pytest.raises(SessionBusyError):
            sessions.begin(OWNER, session_id)
        with pytest.raises(SessionBusyError):
            sessions.delete(OWNER, session_id)
    clocks.pass_(LEASE_SECONDS * 0.9)
    sessions._store.renew(running.lease, LEASE_SECONDS)
    clocks.set_by(-jump)
    clocks.pass_(LEASE_SECONDS * 0.2)
    with pytest.raises(SessionBusyError):
        sessions.begin(OWNER, renewed)
    assert turn(sessions, forgotten).position == 4
    with pytest.raises(SessionMovedError):
        sessions.commit(dead, dead.state)
    assert sessions.commit(running, running.state.extended(b"d", (), WINDOW)).position == 4


def test_the_time_between_two_starts_counts(opened: Opener, clocks: Clocks) -> None:
    sessions = opened()
    session_id = new(sessions, ttl=3 * HOUR)
    sessions.close()
    clocks.pass_(2 * HOUR)
    sessions = opened()
    clocks.pass_(0.9 * HOUR)
    assert is_there(sessions, session_id)
    clocks.pass_(0.2 * HOUR)
    assert not is_there(sessions, session_id)


@pytest.mark.parametrize("jump", [each for each in JUMPS if each < 0])
def test_a_clock_that_is_behind_at_a_start_expires_nothing_early(
    opened: Opener, clocks: Clocks, jump: float, caplog: pytest.LogCaptureFixture
) -> None:
    sessions = opened()
    session_id = new(sessions, ttl=3 * HOUR)
    sessions.close()
    clocks.set_by(jump)
    with caplog.at_level(logging.WARNING):
        sessions = opened()
    assert [f"{-jump:.0f} seconds behind" in line for line in caplog.messages] == [True]
    shown = sessions.find(OWNER, session_id).expires_at
    assert shown == pytest.approx(clocks.wall + 3 * HOUR, abs=1.0)
    clocks.pass_(2 * HOUR)
    clocks.set_by(-jump)
    sessions.maintain()
    clocks.pass_(0.9 * HOUR)
    sessions.maintain()
    assert text_of(sessions, session_id) == b"abc"
    clocks.pass_(0.2 * HOUR)
    assert not is_there(sessions, session_id)


@pytest.mark.parametrize("jump", [each for each in JUMPS if each > 2 * HOUR])
@pytest.mark.parametrize("is_restarted", [False, True])
def test_a_clock_that_is_ahead_at_a_start_deletes_nothing_if_it_is_put_right(
    opened: Opener, clocks: Clocks, jump: float, is_restarted: bool
) -> None:
    """Until then the session is unknown, as after so long a downtime."""
    sessions = opened()
    session_id = new(sessions, ttl=3 * HOUR)
    sessions.close()
    clocks.set_by(jump)
    sessions = opened()
    clocks.pass_(HOUR)
    for _ in range(3):
        assert not sessions.maintain()
        assert not is_there(sessions, session_id)
        clocks.pass_(HOUR / 3)
    if is_restarted:
        sessions.close()
    clocks.set_by(-jump)
    if is_restarted:
        sessions = opened()
    assert text_of(sessions, session_id) == b"abc"
    clocks.pass_(0.9 * HOUR)
    sessions.maintain()
    assert is_there(sessions, session_id)
    clocks.pass_(0.2 * HOUR)
    assert not is_there(sessions, session_id)


def test_what_expired_between_two_starts_is_deleted_in_the_end(
    opened: Opener, clocks: Clocks
) -> None:
    sessions = opened()
    short, long = new(sessions, ttl=3 * HOUR), new(sessions, ttl=YEAR)
    sessions.close()
    clocks.pass_(50 * HOUR)
    sessions = opened()
    sessions.maintain()
    assert num_kept(sessions) == 2
    clocks.pass_(7 * HOUR)
    sessions.maintain()
    assert num_kept(sessions) == 1
    assert not is_there(sessions, short)
    assert is_there(sessions, long)


@pytest.mark.parametrize("jump", [each for each in JUMPS if each > 0])
@pytest.mark.parametrize("is_killed", [False, True])
def test_a_jump_forward_that_stays_is_none_for_the_next_process(
    opened: Opener, clocks: Clocks, jump: float, is_killed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It is saved with the time, so that it is not taken for a downtime."""
    sessions = opened()
    session_id = new(sessions, ttl=3 * HOUR)
    clocks.set_by(jump)
    sessions.maintain()
    if is_killed:
        killed(sessions)
    clocks.pass_(HOUR)
    caplog.clear()
    sessions = opened()
    assert not any("behind" in line for line in caplog.messages)
    clocks.pass_(1.9 * HOUR)
    sessions.maintain()
    assert text_of(sessions, session_id) == b"abc"
    clocks.pass_(0.2 * HOUR)
    assert not is_there(sessions, session_id)


@pytest.mark.parametrize("jump", JUMPS)
@pytest.mark.parametrize("num_starts", [0, 1, 2])
def test_a_jump_that_is_undone_between_starts_expires_nothing_early(
    opened: Opener, clocks: Clocks, jump: float, num_starts: int
) -> None:
    """The way back from a clock that was behind looks like a downtime, and is none."""
    sessions = opened()
    session_id = new(sessions, ttl=3 * HOUR)
    clocks.set_by(jump)
    sessions.maintain()
    for _ in range(num_starts):
        sessions.close()
        clocks.pass_(0.1 * HOUR)
        sessions = opened()
        clocks.pass_(0.1 * HOUR)
        sessions.maintain()
    sessions.close()
    clocks.set_by(-jump)
    sessions = opened()
    for _ in range(4):
        clocks.pass_(0.5 * HOUR)
        sessions.maintain()
        assert text_of(sessions, session_id) == b"abc"
    clocks.pass_(3 * HOUR)
    assert not is_there(sessions, session_id)


@pytest.mark.parametrize("jump", [each for each in JUMPS if each < 0])
def test_a_clock_that_stays_behind_counts_what_processes_see(
    opened: Opener, clocks: Clocks, jump: float
) -> None:
    """Downtimes do not count until it has caught up: it may have been right before."""
    sessions = opened()
    session_id = new(sessions, ttl=3 * HOUR)
    clocks.set_by(jump)
    for _ in range(3):
        clocks.pass_(0.9 * HOUR)
        assert is_there(sessions, session_id)
        sessions.close()
        clocks.pass_(0.2 * HOUR)
        sessions = opened()
    clocks.pass_(0.5 * HOUR)
    assert not is_there(sessions, session_id)
