"""Turns that go on without their clients: what was missed is told, and nothing twice."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from cottention.engine.errors import SessionMovedError, SnapshotMismatchError
from cottention.server.generation.chat_template import find_template
from tests.server.live import Live, eventually, serving
from tests.server.sessions.test_session_turns import is_free
from tests.server.sessions.test_sessions import error_of
from tests.server.sse import Told, read_events, read_told, text_of

SECONDS = 0.005


@pytest.fixture
def live() -> Iterator[Live]:
    with serving() as live:
        live.engine.step_seconds = SECONDS
        live.step_with_loop()
        yield live
        eventually(lambda: not live.sessions.leased)
        eventually(lambda: not live.turns._live)


def going_on(session_id: str, num: int = 30, **more: Any) -> dict[str, Any]:
    body = {"prompt": "y", "session_id": session_id, "max_tokens": num, "stream": True}
    return body | {"on_disconnect": "continue"} | more


def missed(live: Live, session_id: str, last: str | None = None) -> list[Told]:
    """What is told of a turn, to its end."""
    response = after(live, session_id, last)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return read_told(response.text)


def after(live: Live, session_id: str, last: str | None = None) -> httpx.Response:
    headers = {} if last is None else {"Last-Event-ID": last}
    return live.client.get(f"/v1/sessions/{session_id}/events", headers=headers)


def left_after(live: Live, num_events: int, **body: Any) -> list[Told]:
    """Ask by hand, read so many events, and leave."""
    with live.connect(**body) as sock:
        return read_events(sock, num_events)


@contextlib.contextmanager
def in_mid_turn(live: Live) -> Iterator[None]:
    """The turn that is begun in the block does not end in it."""
    live.engine.hold_after = live.engine.num_generated + 5
    yield
    eventually(lambda: not live.engine.may_step.is_set())
    live.engine.may_step.set()


def test_a_stream_without_interruption_has_ids(live: Live) -> None:
    session_id = live.opened("x")
    response = live.client.post("/v1/completions", json=going_on(session_id))
    told = read_told(response.text)
    turns, numbers = zip(*(each.id.split("-") for each in told), strict=True)
    assert len(set(turns)) == 1
    assert numbers == tuple(str(n) for n in range(len(told)))
    assert told[-1].data == "[DONE]"
    assert told[-2].json["session"] == {
        "id": session_id,
        "position": 32,
        "context_start": 0,
        "durable": True,
    }
    assert live.text_of(session_id) == "xy" + text_of(told)
    assert missed(live, session_id) == told


@pytest.mark.parametrize("num_events", [1, 4, 17])
@pytest.mark.parametrize("is_over", [False, True])
def test_a_client_that_comes_back_misses_nothing(
    live: Live, num_events: int, is_over: bool
) -> None:
    session_id, twin = live.opened("x"), live.opened("x")
    begun = left_after(live, num_events, **going_on(session_id))
    if is_over:
        eventually(lambda: live.sessions.ends)
    told = begun + missed(live, session_id, begun[-1].id)
    whole = read_told(live.client.post("/v1/completions", json=going_on(twin)).text)
    assert text_of(told) == text_of(whole)
    assert len({each.id for each in told}) == len(told)
    assert [each.data for each in told].count("[DONE]") == 1
    assert live.text_of(session_id) == live.text_of(twin)
    assert after(live, session_id, told[-1].id).status_code == 204
    assert is_free(live, session_id)


def test_who_has_heard_the_end_is_not_kept_waiting() -> None:
    """It may ask while the turn is still being put away."""
    with serving() as live:
        session_id = live.opened("x")
        for _ in range(20):
            body = going_on(session_id, num=1, on_conflict="wait")
            told = read_told(live.client.post("/v1/completions", json=body).text)
            assert after(live, session_id, told[-1].id).status_code == 204


def test_several_may_follow_and_leave_again(live: Live) -> None:
    session_id = live.opened("x")
    begun = left_after(live, 2, **going_on(session_id, num=100))
    with ThreadPoolExecutor() as pool:
        all_of_it = [pool.submit(missed, live, session_id) for _ in range(3)]
        rest = pool.submit(missed, live, session_id, begun[-1].id)
        for _ in range(3):
            with live.client.stream("GET", f"/v1/sessions/{session_id}/events") as response:
                next(response.iter_lines())
        first, *others = [each.result() for each in all_of_it]
        assert others == [first, first]
        assert begun + rest.result() == first
    assert len(text_of(first)) == 100


def test_a_chat_goes_on_too() -> None:
    with serving(template=find_template("plain", Path())) as live:
        live.engine.step_seconds = SECONDS
        session_id = live.opened("x")
        body = going_on(session_id, num=20)
        del body["prompt"]
        response = live.chat("Hello", **body)
        told = read_told(response.text)
        assert told[0].json["choices"][0]["delta"]["role"] == "assistant"
        deltas = [each.json["choices"][0]["delta"].get("content", "") for each in told[:-1]]
        assert "".join(deltas) == "abcdefghijklmnopqrst"
        assert len({each.id for each in told}) == len(told)
        assert missed(live, session_id, told[3].id) == told[4:]


def test_a_whole_answer_goes_on_and_can_be_followed(live: Live) -> None:
    session_id = live.opened("x")
    body = going_on(session_id, num=60, stream=False, logprobs=1, return_token_ids=True)
    with live.connect(**body):
        eventually(lambda: live.engine.num_generated > 5)
    told = missed(live, session_id)
    assert text_of(told) == ("abcdefghijklmnopqrstuvwxyz" * 3)[:60]
    assert live.text_of(session_id) == "xy" + text_of(told)
    assert live.sessions.ends == ["commit"]
    assert told[-2].json["session"]["position"] == 62


def test_a_whole_answer_is_the_same_as_without(live: Live) -> None:
    session_id, twin = live.opened("x"), live.opened("x")
    body = going_on(session_id, num=5, stream=False, logprobs=1, return_token_ids=True)
    answer = live.complete(**body)
    plain = live.complete(**body | {"session_id": twin, "on_disconnect": "cancel"})
    assert answer.headers["etag"] == plain.headers["etag"] == '"7"'
    same = ("choices", "usage", "object")
    assert [answer.json()[each] for each in same] == [plain.json()[each] for each in same]
    assert answer.json()["session"] == plain.json()["session"] | {"id": session_id}


def test_who_was_away_too_long_is_told_so() -> None:
    with serving(session_event_log_bytes=2000) as live:
        live.step_with_loop()
        session_id = live.opened("x")
        told = read_told(
            live.client.post("/v1/completions", json=going_on(session_id, num=60)).text
        )
        kept = missed(live, session_id)
        assert kept == told[-len(kept) :]
        assert 3 < len(kept) < 20
        assert error_of(after(live, session_id, told[2].id)) == GONE
        first = int(kept[0].id.split("-")[1])
        assert missed(live, session_id, told[first - 1].id) == kept


GONE = (410, "Last-Event-ID", "events_gone")


def test_ids_of_no_event_and_of_other_turns(live: Live) -> None:
    session_id = live.opened("x")
    assert after(live, session_id).status_code == 204, "nothing was told yet"
    first = read_told(live.client.post("/v1/completions", json=going_on(session_id)).text)
    for wrong in ("7", "x-1", f"{first[0].id}x", "0123456789abcdef-99999999999999999999", "é"):
        headers = {"Last-Event-ID": wrong.encode()}
        response = live.client.get(f"/v1/sessions/{session_id}/events", headers=headers)
        assert error_of(response)[:2] == (400, "Last-Event-ID"), wrong
    turn, last = first[-1].id.split("-")
    assert error_of(after(live, session_id, f"{turn}-{int(last) + 1}"))[0] == 400
    assert error_of(after(live, session_id, "0123456789abcdef-0")) == GONE
    assert missed(live, session_id, "") == first
    with in_mid_turn(live):
        second = left_after(live, 2, **going_on(session_id))
        assert missed(live, session_id, first[3].id) == first[4:], "kept until the next one ends"
    told = second + missed(live, session_id, second[-1].id)
    assert error_of(after(live, session_id, first[3].id)) == GONE
    assert missed(live, session_id) == told
    assert live.client.post(f"/v1/sessions/{session_id}/rewind").status_code == 200
    assert missed(live, session_id) == first, "a session that goes back has its events of then"


def test_a_turn_that_ends_with_its_client_keeps_no_events(live: Live) -> None:
    session_id = live.opened("x")
    told = read_told(live.client.post("/v1/completions", json=going_on(session_id)).text)
    plain = live.client.post("/v1/completions", json=going_on(session_id, on_disconnect="cancel"))
    assert "id: " not in plain.text
    assert after(live, session_id).status_code == 204
    assert error_of(after(live, session_id, told[0].id)) == GONE


def test_a_client_that_leaves_cancels_unless_it_says_otherwise(live: Live) -> None:
    session_id = live.opened("x")
    body = going_on(session_id, num=1_000_000, on_disconnect="cancel")
    with live.connect(**body) as sock:
        read_events(sock, 3)
    eventually(lambda: live.sessions.ends, equals=["commit"])
    eventually(lambda: live.engine.cancelled)
    assert after(live, session_id).status_code == 204


def test_only_a_session_goes_on(live: Live) -> None:
    for endpoint in (live.complete, lambda **body: live.chat("x", **body)):
        response = endpoint(prompt="x", on_disconnect="continue", max_tokens=1)
        assert error_of(response)[:2] in ((400, "on_disconnect"), (400, "prompt"))
    assert error_of(live.complete(prompt="x", on_disconnect="continue"))[1] == "on_disconnect"
    assert error_of(live.complete(prompt="x", on_disconnect="go"))[1] == "on_disconnect"


def test_events_are_their_owners_alone() -> None:
    with serving(api_key=("one", "two")) as live:
        one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        session_id = live.client.post("/v1/sessions", json={}, headers=one).json()["id"]
        url = f"/v1/sessions/{session_id}/events"
        with ThreadPoolExecutor() as pool:
            with in_mid_turn(live):
                asked = pool.submit(
                    live.client.post, "/v1/completions", json=going_on(session_id), headers=one
                )
                eventually(lambda: live.turns._live)
                assert error_of(live.client.get(url, headers=two))[0] == 404
                assert live.client.get(url).status_code == 401
            assert asked.result().text == live.client.get(url, headers=one).text
        assert error_of(live.client.get(url, headers=two))[0] == 404
        assert live.client.get("/v1/sessions/none/events", headers=one).status_code == 404


def test_one_writer_while_a_turn_goes_on(live: Live) -> None:
    session_id = live.opened("x")
    with in_mid_turn(live):
        left_after(live, 1, **going_on(session_id, num=60))
        url = f"/v1/sessions/{session_id}"
        assert live.complete(prompt="z", session_id=session_id).status_code == 409
        assert live.client.delete(url).status_code == 409
    waited = live.complete(prompt="z", session_id=session_id, on_conflict="wait", max_tokens=1)
    assert waited.json()["session"]["position"] == 64


def test_a_turn_that_waits_behind_another_can_be_followed(live: Live) -> None:
    """The second begins before the first has told its end, and is not forgotten with it."""
    session_id = live.opened("x")
    with ThreadPoolExecutor() as pool:
        body = going_on(session_id, num=20, on_conflict="wait")
        told = [pool.submit(live.client.post, "/v1/completions", json=body) for _ in range(4)]
        texts = [text_of(read_told(each.result().text)) for each in told]
    assert texts == ["abcdefghijklmnopqrst"] * 4
    assert len(live.text_of(session_id)) == 1 + 4 * 21


def test_a_failed_turn_tells_so_and_keeps_nothing(live: Live) -> None:
    session_id = live.opened("x")
    response = live.client.post("/v1/completions", json=going_on(session_id, prompt="fail"))
    told = read_told(response.text)
    assert "the engine failed" in told[-1].json["error"]["message"]
    assert live.text_of(session_id) == "x"
    eventually(lambda: not live.turns._live)
    assert error_of(after(live, session_id, told[0].id)) == GONE
    whole = live.complete(**going_on(session_id, prompt="fail", stream=False))
    assert whole.status_code == 500
    assert is_free(live, session_id)


@pytest.mark.parametrize("stream", [False, True])
def test_a_turn_that_cannot_be_kept(live: Live, stream: bool) -> None:
    session_id = live.opened("x")
    live.sessions.fails["commit"] = SessionMovedError("taken over")
    response = live.complete(**going_on(session_id, stream=stream))
    assert response.status_code == (200 if stream else 412)
    assert "session_moved" in response.text
    live.sessions.leased.clear()


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_turn_was_none(live: Live, stream: bool) -> None:
    session_id = live.opened("x")
    response = live.complete(**going_on(session_id, prompt=[999], stream=stream))
    assert response.status_code == 400
    assert live.sessions.ends == ["abandon"]


def test_a_full_disk_is_told_in_what_is_kept(live: Live) -> None:
    live.sessions.is_full = True
    session_id = live.opened("x")
    told = read_told(live.client.post("/v1/completions", json=going_on(session_id)).text)
    assert told[-2].json["session"]["durable"] is False
    assert missed(live, session_id) == told


def test_a_server_that_stops_ends_a_turn_that_goes_on(live: Live) -> None:
    session_id = live.opened("x")
    begun = left_after(live, 3, **going_on(session_id, num=1_000_000))
    live.loop_call(live.async_engine.cancel_all)
    eventually(lambda: live.sessions.ends, equals=["commit"])
    told = begun + missed(live, session_id, begun[-1].id)
    assert told[-2].json["choices"][0]["finish_reason"] == "abort"
    kept = live.text_of(session_id)
    assert kept == "xy" + text_of(told)
    assert told[-2].json["session"]["position"] == len(kept)


def test_a_server_drains_until_the_turn_has_ended() -> None:
    """Nobody reads it, and still it is a turn that runs."""
    with serving() as live:
        session_id = live.opened("x")
        with in_mid_turn(live):
            left_after(live, 1, **going_on(session_id, num=50))
            live.loop_call(live.async_engine.drain)
            assert not live.async_engine._dispatcher._idle.is_set()
        eventually(live.async_engine._dispatcher._idle.is_set)
        eventually(lambda: live.sessions.ends, equals=["commit"])
        assert len(live.text_of(session_id)) == 52


@pytest.mark.parametrize("on_disconnect", ["cancel", "continue"])
def test_comments_while_there_is_nothing_to_tell(on_disconnect: str) -> None:
    with serving(sse_keep_alive_seconds=0.05) as live:
        session_id = live.opened("x")
        live.engine.may_step.clear()
        with live.connect(**going_on(session_id, num=2, on_disconnect=on_disconnect)) as sock:
            raw = b""
            while raw.count(b": keep-alive") < 3:
                raw += sock.recv(1000)
            live.engine.may_step.set()
            while b"[DONE]" not in raw:
                raw += sock.recv(1000)
        assert live.text_of(session_id) == "xyab"


def test_who_stalls_falls_behind_and_keeps_nobody() -> None:
    """Each letter is said ten thousand times, so that the socket is full soon."""
    with serving(session_event_log_bytes=100_000) as live:
        session_id = live.opened("x")
        body = going_on(session_id, num=2000, prompt="loud")
        with live.connect(**body) as sock:
            eventually(lambda: live.sessions.ends, equals=["commit"])
            raw = b""
            while b"events_gone" not in raw[-2000:]:
                raw += sock.recv(1 << 20)
            assert b"[DONE]" not in raw
        assert is_free(live, session_id)


def test_a_session_of_another_model_says_what_differs(live: Live) -> None:
    session_id = live.opened("x")
    live.sessions.fails["begin"] = SnapshotMismatchError("the snapshot differs in config")
    response = live.complete(prompt="y", session_id=session_id)
    assert error_of(response) == (409, "session_id", "snapshot_mismatch")
    assert "config" in response.text
