"""Turns that meet, are cut, or fail: what stays of them, and that the session is free again."""

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cottention.engine.errors import SnapshotError
from cottention.engine.state.session_state import SessionState
from cottention.server.generation.cancellation import Cancellation
from cottention.server.generation.chat_template import find_template
from cottention.server.generation.request import TurnOptions
from cottention.server.sessions import turn
from cottention.server.sessions.turn_queue import Caller, TurnQueue
from tests.server.fake_sessions import FakeSessions
from tests.server.live import PATIENCE, Live, eventually, serving

ENDLESS = {"prompt": "y", "max_tokens": 1_000_000}


def is_free(live: Live, session_id: str) -> bool:
    """Whether nobody holds the session, and its next turn is let in."""
    eventually(lambda: not live.sessions.leased)
    eventually(lambda: live.complete(prompt="z", session_id=session_id, max_tokens=1).is_success)
    return True


def received(sock: Any, least: int = 1) -> str:
    """The text of at least so many events."""
    raw = b""
    while raw.count(b'"text"') < least:
        raw += sock.recv(1 << 16)
    return "".join(part.split(b'"')[1].decode() for part in raw.split(b'"text":')[1:])


def test_the_second_of_two_turns_is_refused_or_waits() -> None:
    with serving() as live, ThreadPoolExecutor() as pool:
        session_id = live.opened("x")
        turn = {"prompt": "y", "session_id": session_id, "max_tokens": 2}
        live.engine.may_step.clear()
        first = pool.submit(lambda: live.complete(**turn))
        eventually(lambda: live.sessions.leased)
        refused = live.complete(**turn)
        assert refused.json()["error"]["code"] == "session_busy"
        assert refused.status_code == 409
        assert live.client.delete(f"/v1/sessions/{session_id}").status_code == 409
        assert live.client.post(f"/v1/sessions/{session_id}/rewind").status_code == 409
        waiting = []
        for letter in "uvw":
            body = turn | {"prompt": letter, "on_conflict": "wait"}
            waiting.append(pool.submit(lambda body=body: live.complete(**body)))
            eventually(lambda: len(line_of(live, session_id)), equals=len(waiting) + 1)
        live.engine.may_step.set()
        assert [each.result().status_code for each in (first, *waiting)] == [200] * 4
        assert live.text_of(session_id) == "xyabuabvabwab"
        eventually(lambda: line_of(live, session_id) is None)


def line_of(live: Live, session_id: str) -> Any:
    return live.turns._queues.get(("", session_id))


def test_who_waits_and_leaves_is_not_waited_for() -> None:
    with serving() as live, ThreadPoolExecutor() as pool:
        session_id = live.opened("x")
        turn = {"prompt": "y", "session_id": session_id, "max_tokens": 2}
        live.engine.may_step.clear()
        first = pool.submit(lambda: live.complete(**turn))
        eventually(lambda: live.sessions.leased)
        with live.connect(**turn, on_conflict="wait"):
            eventually(lambda: len(line_of(live, session_id)), equals=2)
        eventually(lambda: len(line_of(live, session_id)), equals=1)
        live.engine.may_step.set()
        assert first.result().status_code == 200
        assert live.text_of(session_id) == "xyab"
        assert is_free(live, session_id)


def test_a_cut_stream_keeps_what_was_delivered() -> None:
    with serving() as live:
        session_id = live.opened("x")
        live.engine.step_seconds = 0.005
        with live.connect(**ENDLESS, session_id=session_id, stream=True) as sock:
            text = received(sock, least=5)
        eventually(lambda: live.sessions.ends, equals=["commit"])
        kept = live.text_of(session_id)
        assert kept.startswith("xy" + text)
        assert len(kept) <= len("xy" + text) + 30, "what was sent, and no more"
        assert is_free(live, session_id)


def test_a_stalled_reader_keeps_what_was_written_to_its_socket() -> None:
    """Each letter is said ten thousand times, so that the socket is full soon."""
    with serving() as live:
        session_id = live.opened("x")
        live.step_with_loop()
        body = {"prompt": "loud", "max_tokens": 1_000_000, "session_id": session_id}
        with live.connect(**body, stream=True) as sock:
            sock.recv(1)  # something has been written
            eventually(lambda: any(each.is_paused for each in [*live.engine.running.values()]))
        eventually(lambda: live.sessions.ends, equals=["commit"])
        assert live.sessions.state_of(session_id).num_tokens < live.engine.num_generated
        assert is_free(live, session_id)


def test_a_cut_stream_that_leaves_too_much_to_read_is_undone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its snapshot would be one that no server takes."""
    monkeypatch.setattr(turn, "MAX_PENDING", 12)
    with serving() as live:
        session_id = live.opened("x")
        live.engine.step_seconds = 0.005
        with live.connect(**ENDLESS, session_id=session_id, stream=True) as sock:
            received(sock, least=12)
        eventually(lambda: live.sessions.ends, equals=["abandon"])
        assert live.text_of(session_id) == "x"
        assert is_free(live, session_id)


def test_a_cut_stream_may_be_rolled_back() -> None:
    with serving() as live:
        session_id = live.opened("x")
        live.engine.step_seconds = 0.005
        body = ENDLESS | {"session_id": session_id, "on_cancel": "rollback"}
        with live.connect(**body, stream=True) as sock:
            received(sock, least=3)
        eventually(lambda: live.sessions.ends, equals=["abandon"])
        assert live.text_of(session_id) == "x"
        assert is_free(live, session_id)


@pytest.mark.parametrize("stream", [False, True])
def test_a_turn_of_which_nothing_was_sent_was_none(stream: bool) -> None:
    with serving() as live:
        session_id = live.opened("x")
        if stream:
            live.engine.may_step.clear()
        with live.connect(**ENDLESS, session_id=session_id, stream=stream):
            eventually(lambda: live.engine.running)
        eventually(lambda: not live.async_engine.streams)  # the server has seen that it left
        live.engine.may_step.set()
        eventually(lambda: live.sessions.ends, equals=["abandon"])
        assert live.text_of(session_id) == "x"
        assert is_free(live, session_id)


def test_an_append_whose_client_leaves_was_none() -> None:
    with serving() as live:
        session_id = live.opened("x")
        live.engine.may_step.clear()
        with live.connect(f"/v1/sessions/{session_id}/append", prompt="y"):
            eventually(lambda: live.engine.running)
        eventually(lambda: live.sessions.ends, equals=["abandon"])
        live.engine.may_step.set()
        assert live.text_of(session_id) == "x"
        assert is_free(live, session_id)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_turn_was_none(stream: bool) -> None:
    with serving() as live:
        session_id = live.opened("x")
        response = live.complete(prompt="fail", session_id=session_id, stream=stream)
        assert response.status_code == (200 if stream else 500)
        assert "the engine failed" in response.text
        assert live.text_of(session_id) == "x"
        assert is_free(live, session_id)
        assert live.sessions.ends == ["abandon", "commit"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_turn_was_none(stream: bool) -> None:
    """The engine refuses it after it has begun."""
    with serving() as live:
        session_id = live.opened("x")
        response = live.complete(prompt=[999], session_id=session_id, stream=stream)
        assert response.status_code == 400
        assert live.sessions.ends == ["abandon"]
        assert is_free(live, session_id)


def test_a_damaged_session_is_the_servers_fault() -> None:
    with serving() as live:
        session_id = live.opened("x")
        live.sessions.fails["begin"] = SnapshotError("secret path")
        response = live.complete(prompt="y", session_id=session_id)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "session_damaged"
        assert "secret" not in response.text
        assert is_free(live, session_id)


class HeldCall:
    """A call of the sessions that stops until it may go on."""

    def __init__(self, sessions: FakeSessions, held: str, patch: pytest.MonkeyPatch) -> None:
        self.is_reached, self.may_go = threading.Event(), threading.Event()
        may_fail = sessions._may_fail

        def hold(name: str) -> None:
            if name == held:
                self.is_reached.set()
                assert self.may_go.wait(PATIENCE)
            may_fail(name)

        patch.setattr(sessions, "_may_fail", hold)


async def cancelled_in_mid_turn(turns: TurnQueue, session_id: str, call: HeldCall) -> None:
    """A turn that commits at once, in a task that is cancelled while a call of it is held."""

    async def nobody() -> Any:
        await asyncio.Event().wait()

    async def work() -> None:
        terms = TurnOptions(session_id, on_conflict="wait")
        never = Cancellation(lambda _: None)
        async with turns.turn(Caller("", None), terms, nobody, never) as turn:
            await turn.commit(turn.state)

    task = asyncio.create_task(work())
    assert await asyncio.to_thread(call.is_reached.wait, PATIENCE)
    task.cancel()
    call.may_go.set()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await turns.wait_settled()
    assert not turns._queues


@pytest.mark.parametrize("held", ["begin", "commit"])
def test_a_cancelled_task_leaves_no_lease(held: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions: Any = FakeSessions()
    session_id = sessions.open("", SessionState(), {}, None).id
    call = HeldCall(sessions, held, monkeypatch)
    asyncio.run(cancelled_in_mid_turn(TurnQueue(sessions), session_id, call))
    assert not sessions.leased
    assert sessions.ends == ["abandon" if held == "begin" else "commit"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_stops_keeps_what_it_tells(stream: bool) -> None:
    with serving() as live:
        session_id = live.opened("x")
        live.engine.step_seconds = 0.005
        body = ENDLESS | {"session_id": session_id, "stream": stream}
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(lambda: live.complete(**body))
            eventually(lambda: live.engine.num_generated > 5)
            live.loop_call(live.async_engine.cancel_all)
            text = answer.result().text
        assert "abort" in text
        assert f'"id":"{session_id}"' in text
        kept = live.text_of(session_id)
        assert kept.startswith("xyabcde")
        assert f'"position":{len(kept)}' in text


def test_a_chat_is_a_turn_too() -> None:
    template = find_template("plain", Path())
    with serving(template=template) as live:
        session_id = live.opened("x")
        answer = live.chat("Hello", session_id=session_id, max_tokens=2).json()
        assert answer["choices"][0]["message"]["content"] == "ab"
        assert answer["session"]["position"] == len(live.text_of(session_id))
        assert live.text_of(session_id).endswith("Hello\n\nAssistant:ab")


def test_many_turns_of_many_sessions_leave_nothing_behind() -> None:
    with serving() as live, ThreadPoolExecutor(16) as pool:
        ids = [live.opened("x") for _ in range(4)]
        body = {"prompt": "y", "max_tokens": 3, "on_conflict": "wait"}
        answers = pool.map(lambda n: live.complete(**body, session_id=ids[n % 4]), range(40))
        assert {each.status_code for each in answers} == {200}
        assert [live.text_of(each) for each in ids] == ["x" + "yabc" * 10] * 4
        eventually(lambda: not live.turns._queues and not live.sessions.leased)
