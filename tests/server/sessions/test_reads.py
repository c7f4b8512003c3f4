"""Reads of snapshots and events: counted, sent in pieces, and ended where nobody reads."""

import contextlib
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import cast

import httpx
import psutil
import pytest
import torch

from cottention.engine.engine import Engine
from cottention.engine.sessions.fingerprint import Fingerprint
from cottention.engine.sessions.snapshot import SnapshotCodec
from cottention.engine.state.context_window import context_schedules
from cottention.engine.state.event_log import EventLog
from cottention.engine.state.session_state import SessionState
from cottention.engine.state.spec import StateSpec, recurrence_tensors
from cottention.server.config import ServerConfig
from cottention.server.http.errors import ApiError
from cottention.server.limits.api_keys import owner_id
from cottention.server.sessions.reads import ReadLimit
from cottention.server.sessions.storage import open_sessions
from tests.server.fake_engine import FakeEngine
from tests.server.http.test_hostile import answer
from tests.server.limits.test_api_keys import bearer
from tests.server.live import Live, eventually, serving
from tests.server.sessions.test_session_events import going_on, left_after

ONE, TWO = "first-key", "second-key"
WIDTH = 2240
SPEC = StateSpec(recurrence_tensors(layers=1, heads=1, value_width=WIDTH, key_width=WIDTH))
SNAPSHOT_BYTES = 4 * WIDTH * WIDTH
"""20 MB: more than the buffers between server and client take."""

EVENTS = EventLog("0" * 16, 0, (b"data: %s\n\n" % (b"x" * 1000),) * 20_000)


class LargeEngine(FakeEngine):
    """A fake engine whose snapshots are large."""

    def session_codec(self) -> SnapshotCodec:
        prints = Fingerprint("w", "t", "c", "l")
        return SnapshotCodec(prints, SPEC, 256, context_schedules(512), 512)


class Large:
    """A server with a large session of the first key, which is on the disk alone."""

    def __init__(self, live: Live) -> None:
        self.live = live
        owner, rows = owner_id(ONE), (torch.ones(1, 1, WIDTH, WIDTH),)
        state = SessionState(rows, 2, (3,), (1, 2, 3), {1: 0, 2: 0, 3: 0})
        name = live.sessions.open(owner, state, {}, None).id
        live.sessions.commit(live.sessions.begin(owner, name), state, EVENTS)
        self.paths = [f"/v1/sessions/{name}/snapshot", f"/v1/sessions/{name}/events"]

    def get(self, path: str) -> httpx.Response:
        return self.live.client.get(path, headers=bearer(ONE))

    @contextlib.contextmanager
    def unread(self, path: str) -> Iterator[socket.socket]:
        """A GET whose answer is not read after its first bytes."""
        host, port = self.live.url.removeprefix("http://").split(":")
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(60)
            sock.connect((host, int(port)))
            head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ONE}\r\n\r\n"
            sock.sendall(head.encode())
            assert sock.recv(15) == b"HTTP/1.1 200 OK"
            yield sock


@pytest.fixture
def large(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Large]:
    engine = LargeEngine()
    settings = {"session_dir": str(tmp_path), "session_memory": 0, "api_key": (ONE, TWO)}
    settings |= getattr(request, "param", {})
    with contextlib.ExitStack() as stack:
        config = ServerConfig(**settings)
        sessions = stack.enter_context(open_sessions(cast(Engine, engine), config))
        yield Large(stack.enter_context(serving(engine, sessions=sessions, **settings)))


def settings(**values: int | float) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("large", [values], indirect=True, ids=[""])


def code_of(response: httpx.Response) -> str:
    assert response.status_code == 429, response.text
    code: str = response.json()["error"]["code"]
    return code


@settings(key_max_requests=2)
def test_reads_count_as_requests_of_their_key(large: Large) -> None:
    with large.unread(large.paths[0]), large.unread(large.paths[1]) as events:
        for path in large.paths:
            assert code_of(large.get(path)) == "rate_limit_exceeded"
        large.live.client.headers.update(bearer(ONE))
        assert code_of(large.live.complete(prompt="x")) == "rate_limit_exceeded"
        events.close()
        eventually(lambda: large.live.complete(prompt="x").status_code, equals=200)
    eventually(lambda: large.get(large.paths[0]).status_code, equals=200)


@settings(max_session_reads=4)
def test_all_reads_are_bounded_and_one_key_leaves_some_to_others(large: Large) -> None:
    with large.unread(large.paths[0]), large.unread(large.paths[1]):
        assert code_of(large.get(large.paths[0])) == "too_many_reads"
        name = large.live.client.post("/v1/sessions", json={"prompt": "x"}, headers=bearer(TWO))
        path = f"/v1/sessions/{name.json()['id']}/snapshot"
        assert large.live.client.get(path, headers=bearer(TWO)).status_code == 200


def test_unread_reads_hold_a_piece_and_not_the_whole(large: Large) -> None:
    process = psutil.Process()
    assert len(large.get(large.paths[0]).content) > SNAPSHOT_BYTES
    before = process.memory_info().rss
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(large.unread(large.paths[0])) for _ in range(12)]
        assert process.memory_info().rss - before < 3 * SNAPSHOT_BYTES
        assert len(answer_of(socks[0])) > SNAPSHOT_BYTES


def status_of(large: Large, path: str) -> int:
    return large.get(path).status_code


def answer_of(sock: socket.socket) -> bytes:
    """What is left of an answer of known length."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    received = sock.recv(1000)
    head, _, body = received.partition(b"\r\n\r\n")
    [length] = [int(line[16:]) for line in head.split(b"\r\n") if b"content-length" in line]
    found = bytearray(body)
    while len(found) < length:
        found += sock.recv(1 << 20)
    return bytes(found)


@settings(send_seconds=1.0, key_max_requests=1)
def test_a_reader_that_stalls_is_closed_and_its_place_is_free(large: Large) -> None:
    for path in large.paths:
        with large.unread(path) as sock:
            eventually(partial(status_of, large, path), equals=200)
            assert len(answer(sock)) < SNAPSHOT_BYTES


def test_a_limit_of_reads_leaves_places_to_those_who_have_none() -> None:
    limit = ReadLimit(8)
    with contextlib.ExitStack() as stack:
        for owner, num in (("a", 4), ("b", 2), ("c", 1), ("d", 1), ("e", 0)):
            for _ in range(num):
                stack.enter_context(limit.reading(owner))
            with pytest.raises(ApiError) as caught:
                stack.enter_context(limit.reading(owner))
            assert caught.value.code == "too_many_reads"
    with limit.reading("e"):
        pass


def test_who_follows_a_turn_in_place_of_its_client_is_that_turn() -> None:
    """A client that may have one request can come back to it; others count."""
    with serving(key_max_requests=1) as live:
        live.engine.step_seconds = 0.005
        session_id = live.opened("x")
        left_after(live, 1, **going_on(session_id, num=1_000_000))
        path = f"/v1/sessions/{session_id}/events"
        eventually(lambda: not live.turns.live_events("", session_id).is_followed)
        with live.client.stream("GET", path) as followed:
            assert followed.status_code == 200
            assert code_of(live.client.get(path)) == "rate_limit_exceeded"
        eventually(lambda: not live.turns.live_events("", session_id).is_followed)
        live.async_engine.cancel_all()
        eventually(lambda: not live.sessions.leased)


def test_a_long_answer_belongs_to_its_request_until_it_is_read() -> None:
    """Else what waits for slow clients would be bounded by nothing."""
    with serving(key_max_requests=1) as live:
        with live.connect(prompt="loud", max_tokens=1000) as sock:
            assert sock.recv(15) == b"HTTP/1.1 200 OK"
            assert code_of(live.complete(prompt="x")) == "rate_limit_exceeded"
            assert len(answer_of(sock)) > 10_000_000
        eventually(lambda: live.complete(prompt="x").status_code, equals=200)
