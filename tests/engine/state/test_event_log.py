"""An event buffer keeps the newest events within its limit; a log is stored and read whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cottention.engine.errors import SnapshotError
from cottention.engine.state.event_log import EventBuffer, EventLog

TURN = "0123456789abcdef"
EVENTS = st.lists(st.binary(min_size=1, max_size=9), max_size=30)


@given(events=EVENTS, max_bytes=st.integers(0, 40))
def test_the_newest_are_here_under_their_numbers(events: list[bytes], max_bytes: int) -> None:
    buffer = EventBuffer(TURN, max_bytes)
    for number, event in enumerate(events):
        assert buffer.stop == number
        buffer.add(event)
        assert buffer.since(number, 1) == [event], "the newest is there in any case"
    kept = buffer.to_log()
    assert list(kept.events) == events[kept.first :] == buffer.since(buffer.first, 10**9)
    assert kept.nbytes <= max_bytes or len(kept.events) == 1
    if kept.first:
        assert kept.nbytes + len(events[kept.first - 1]) > max_bytes, "none went in vain"


@given(events=EVENTS, more=EVENTS, max_bytes=st.integers(0, 40))
def test_what_it_would_be(events: list[bytes], more: list[bytes], max_bytes: int) -> None:
    buffer, all_of_them = EventBuffer(TURN, max_bytes), EventBuffer(TURN, max_bytes)
    for event in events:
        buffer.add(event)
    before = buffer.to_log()
    for event in events + more:
        all_of_them.add(event)
    assert buffer.to_log(*more) == all_of_them.to_log()
    assert buffer.to_log() == before


def test_nothing() -> None:
    assert EventBuffer(TURN, 9).to_log() == EventLog(TURN)
    assert EventLog().nbytes == 0


@given(events=EVENTS, first=st.integers(0, 2**63))
def test_a_log_is_stored_and_read_as_it_was(events: list[bytes], first: int) -> None:
    log = EventLog(TURN, first, tuple(events))
    assert EventLog.from_bytes(log.to_bytes()) == log


def test_no_log_takes_no_bytes() -> None:
    """Most turns have no events: their blobs are those of their snapshots."""
    assert EventLog().to_bytes() == b""
    assert EventLog.from_bytes(b"") == EventLog()


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_log_that_is_cut_is_refused(cut: int) -> None:
    raw = EventLog(TURN, 3, (b"data: a", b"data: b")).to_bytes()
    for wrong in (raw[:-cut], raw + b"x" * cut):
        with pytest.raises(SnapshotError):
            EventLog.from_bytes(wrong)
