"""Sessions that another server has, and a store that is slow: who waits, and who need not."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cottention.engine.errors import SessionBusyError
from cottention.server.generation.async_engine import Phase
from cottention.server.sessions import turn_queue
from tests.server.fake_sessions import FakeSessions
from tests.server.live import Live, eventually, serving

ELSEWHERE: Any = object()
"""A turn of another server."""


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_queue, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(turn_queue, "LAST_PAUSE", 0.02)


def num_tries(live: Live) -> Any:
    """Counts the turns that ask the store for a session from now on."""
    tries: list[str] = []
    begin = live.sessions.begin

    def counted(owner: str, session_id: str, *others: Any) -> Any:
        tries.append(session_id)
        return begin(owner, session_id, *others)

    live.sessions.begin = counted
    return lambda: len(tries)


def test_a_turn_waits_for_one_at_another_server() -> None:
    """As it waits for one here; whoever cancels the session's turn meanwhile means the other."""
    with serving() as live, ThreadPoolExecutor() as pool:
        session_id = live.opened("x")
        body = {"prompt": "y", "session_id": session_id, "max_tokens": 2}
        live.sessions.leased[session_id] = ELSEWHERE
        refused = live.complete(**body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "session_busy")
        tries = num_tries(live)
        waiting = pool.submit(lambda: live.complete(**body, on_conflict="wait"))
        eventually(lambda: tries() > 2)
        cancelled = live.client.post(f"/v1/sessions/{session_id}/cancel")
        assert cancelled.json()["status"] == "idle"
        del live.sessions.leased[session_id]
        assert waiting.result().status_code == 200
        live.sessions.leased[session_id] = ELSEWHERE
        path, wait = f"/v1/sessions/{session_id}", {"on_conflict": "wait"}
        forking = pool.submit(lambda: live.client.post(f"{path}/fork", json=wait))
        eventually(lambda: live.turns._queues)
        del live.sessions.leased[session_id]
        assert forking.result().status_code == 200
        assert live.text_of(session_id) == "xyab"


def test_who_waits_for_another_server_may_leave() -> None:
    """By its deadline, its connection, or because this server is being stopped."""
    with serving() as live, ThreadPoolExecutor() as pool:
        session_id = live.opened("x")
        body: dict[str, Any] = {"prompt": "y", "session_id": session_id, "max_tokens": 2}
        body["on_conflict"] = "wait"
        live.sessions.leased[session_id] = ELSEWHERE
        assert live.complete(**body, timeout=0.2).status_code == 504
        tries = num_tries(live)
        with live.connect(**body):
            eventually(lambda: tries() > 2)
        eventually(lambda: not live.turns._queues)
        begun = tries()
        waiting = pool.submit(lambda: live.complete(**body))
        eventually(lambda: tries() > begun + 2)
        live.loop_call(lambda: setattr(live.async_engine, "phase", Phase.DRAINING))
        assert waiting.result().status_code == 503
        del live.sessions.leased[session_id]


def test_a_server_that_may_be_dead_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn after a server has died would be a 409 until the others know that it has."""
    late = SessionBusyError("another turn has it", is_late=True)
    with serving() as live:
        session_id = live.opened("x")
        body = {"prompt": "y", "session_id": session_id, "max_tokens": 2}
        live.sessions.fails["begin"] = late
        assert live.complete(**body).status_code == 200
        monkeypatch.setattr(turn_queue, "LATE_SECONDS", 0.0)  # but not for ever
        live.sessions.fails["begin"] = late
        assert live.complete(**body).status_code == 409


def test_a_slow_database_holds_no_request_without_a_session() -> None:
    """Such a request is parsed in a thread where it is long: none of those may wait for the store.

    More turns wait than asyncio has threads by default.
    """
    may_begin = threading.Event()

    class Slow(FakeSessions):
        def begin(self, *arguments: Any, **named: Any) -> Any:
            may_begin.wait()
            return super().begin(*arguments, **named)

    with serving(sessions=Slow()) as live, ThreadPoolExecutor(40) as pool:
        try:
            made = [live.opened("x") for _ in range(40)]
            begin = [
                pool.submit(lambda each=each: live.complete(prompt="y", session_id=each))
                for each in made
            ]
            eventually(lambda: len(live.turns._queues), equals=40)
            answer = live.complete(prompt="z" * 20_000, max_tokens=1)
            assert answer.status_code == 200
            assert live.client.get("/metrics").status_code == 200
        finally:
            may_begin.set()
        assert {each.result().status_code for each in begin} == {200}
