"""An outbox keeps the newest events, as many as there is room for, and knows their numbers."""

from hypothesis import given
from hypothesis import strategies as st

from cottention.engine.state.event_log import EventBuffer, EventLog

TURN = "0123456789abcdef"
EVENTS = st.lists(st.binary(min_size=1, max_size=9), max_size=30)


@given(events=EVENTS, max_bytes=st.integers(0, 40))
def test_the_newest_are_here_under_their_numbers(events: list[bytes], max_bytes: int) -> None:
    filling = EventBuffer(TURN, max_bytes)
    for number, event in enumerate(events):
        assert filling.stop == number
        filling.add(event)
        assert filling.since(number) == [event], "the newest is there in any case"
    kept = filling.kept()
    assert list(kept.events) == events[kept.first :] == filling.since(filling.first)
    assert kept.nbytes <= max_bytes or len(kept.events) == 1
    if kept.first:
        assert kept.nbytes + len(events[kept.first - 1]) > max_bytes, "none went in vain"


@given(events=EVENTS, more=EVENTS, max_bytes=st.integers(0, 40))
def test_what_it_would_be(events: list[bytes], more: list[bytes], max_bytes: int) -> None:
    filling, all_of_them = EventBuffer(TURN, max_bytes), EventBuffer(TURN, max_bytes)
    for event in events:
        filling.add(event)
    before = filling.kept()
    for event in events + more:
        all_of_them.add(event)
    assert filling.kept(*more) == all_of_them.kept()
    assert filling.kept() == before


def test_nothing() -> None:
    assert EventBuffer(TURN, 9).kept() == EventLog(TURN)
    assert EventLog().nbytes == 0
