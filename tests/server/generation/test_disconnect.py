"""A client that leaves, at whatever moment, ends its work within one step and frees its slots."""

import pytest

from tests.server.live import Live, eventually, serving

ENDLESS = {"prompt": "x", "max_tokens": 1_000_000}


def left_promptly(live: Live, num_requests: int) -> None:
    """Every request was cancelled, and none outlived the step that was running then."""
    eventually(lambda: len(live.engine.cancelled), equals=num_requests)
    assert all(each.ended_at - each.asked_at <= 1 for each in live.engine.cancelled)
    assert live.engine.stats().num_free_slots == live.engine.num_slots
    eventually(
        lambda: not live.async_engine.streams and not live.async_engine._dispatcher.num_prompts
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_frees_the_slots(stream: bool) -> None:
    with serving() as live:
        live.engine.step_seconds = 0.005
        with live.connect(**ENDLESS, n=3, stream=stream):
            eventually(lambda: live.engine.num_generated > 10)
        left_promptly(live, 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_before_the_first_token(stream: bool) -> None:
    with serving() as live:
        live.engine.may_step.clear()
        with live.connect(prompt=["x", "y"], max_tokens=50, stream=stream):
            eventually(lambda: len(live.engine.running), equals=2)
        eventually(lambda: all(r.cancelled_at is not None for r in live.engine.running.values()))
        live.engine.may_step.set()
        left_promptly(live, 2)
        assert live.engine.num_generated == 0


def test_a_disconnect_of_a_paused_stream_frees_its_slots() -> None:
    with serving() as live:
        with live.connect(prompt="loud", max_tokens=1_000_000, stream=True):
            eventually(lambda: any(each.is_paused for each in [*live.engine.running.values()]))
        left_promptly(live, 1)


def test_a_disconnect_leaves_other_streams_complete() -> None:
    """Of twelve streams every third leaves; the others are complete."""
    with serving() as live:
        live.engine.step_seconds = 0.002
        live.engine.may_step.clear()
        socks = [
            live.connect(prompt="x", max_tokens=200 if n % 3 else 1_000_000, stream=True)
            for n in range(12)
        ]
        eventually(lambda: len(live.engine.running), equals=12)
        live.engine.may_step.set()
        for sock in socks[::3]:
            sock.close()
        for sock in socks[1::3] + socks[2::3]:
            received = b""
            with sock:
                while b"[DONE]" not in received:
                    received += sock.recv(1 << 16)
            assert b'"finish_reason":"length"' in received
        left_promptly(live, 4)


def test_a_request_refused_halfway_leaves_nothing_running() -> None:
    """The second prompt is refused by the engine after the first was submitted."""
    with serving() as live:
        response = live.complete(prompt=[[1], [999]], max_tokens=1_000_000)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "prompt"
        left_promptly(live, 1)
