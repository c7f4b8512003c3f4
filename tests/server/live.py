"""A real uvicorn on a free port, in a thread, around a fake engine."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import uvicorn

from cottention.engine.worker import EngineWorker
from cottention.server.api.app import create_app
from cottention.server.cli.open_files import connection_table
from cottention.server.cli.serve import bounded, listening, url_of
from cottention.server.cli.tls import tls_context
from cottention.server.config import ServerConfig
from cottention.server.generation.admission import AdmissionQueue
from cottention.server.generation.async_engine import AsyncEngine
from cottention.server.generation.chat_template import ChatTemplate, UnusableTemplate
from cottention.server.http.listener import BoundedServer
from cottention.server.limits.api_keys import load_api_keys
from tests.server.fake_engine import FakeEngine
from tests.server.fake_sessions import FakeSessions

LOOP_TURNS = 5
"""In which an output has gone from the engine's thread through its reader's task to the socket."""


class _Hurried:
    """asyncio for uvicorn's server: its sleeps are a twentieth as long.

    It looks ten times a second whether it should end, and waits a tenth of a second before it
    closes: longer than most tests take.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / 20)


setattr(uvicorn.server, "asyncio", _Hurried())  # noqa: B010


class Live:
    """A running server and its client."""

    def __init__(
        self,
        engine: Any,
        async_engine: AsyncEngine,
        sessions: Any,
        turns: Any,
        url: str,
        client: httpx.Client,
        server: BoundedServer,
    ) -> None:
        self.server = server
        self.engine = engine
        self.sessions = sessions
        self.turns: Any = turns
        self.async_engine = async_engine
        self.url = url
        self.client = client

    def complete(self, **body: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json=body)

    def chat(self, *said: str, **body: Any) -> httpx.Response:
        """Ask with what the user said, a message each."""
        messages = [{"role": "user", "content": each} for each in said]
        return self.client.post("/v1/chat/completions", json={"messages": messages} | body)

    def opened(self, prompt: str | list[int] = "", **body: Any) -> str:
        """The id of a new session."""
        response = self.client.post("/v1/sessions", json={"prompt": prompt} | body)
        assert response.status_code == 200, response.text
        session_id: str = response.json()["id"]
        return session_id

    def session(self, session_id: str) -> Any:
        """A session's object."""
        return self.client.get(f"/v1/sessions/{session_id}").json()

    def events(self, **body: Any) -> list[Any]:
        """The events of a streamed answer, parsed; [DONE] as text."""
        return [data if data == "[DONE]" else json.loads(data) for data in self.stream_data(**body)]

    def stream_data(self, **body: Any) -> list[str]:
        response = self.client.post("/v1/completions", json={"stream": True} | body)
        assert response.status_code == 200, response.text
        *blocks, last = response.text.split("\n\n")
        assert last == ""
        return [block.removeprefix("data: ") for block in blocks if block.startswith("data: ")]

    def text_of(self, session_id: str) -> str:
        """What a session holds, where its ids are bytes."""
        return bytes(self.sessions.state_of(session_id).recent).decode()

    def loop_call(self, work: Callable[[], None]) -> None:
        """Have something done on the server's event loop, and wait until it is."""
        done = threading.Event()
        self.async_engine._loop.call_soon_threadsafe(work)
        self.async_engine._loop.call_soon_threadsafe(done.set)
        assert done.wait(PATIENCE), "the event loop is busy, or has ended"

    def step_with_loop(self) -> None:
        """Let each step of the engine wait until the event loop has passed on what came before.

        It is asked to look for that at once, although steps come fast.

        Else a busy machine merges tokens into one event, or draws all of them before a reader that
        stalls is noticed.
        """
        step = self.engine.step

        def stepping() -> Any:
            for _ in range(LOOP_TURNS):
                with contextlib.suppress(RuntimeError):  # the loop has closed
                    self.loop_call(self.async_engine.dispatch)
            return step()

        self.engine.step = stepping

    def connect(self, path: str = "/v1/completions", **body: Any) -> socket.socket:
        """Send a request by hand and leave the answer unread."""
        host, port = self.url.removeprefix("http://").split(":")
        raw = json.dumps(body).encode()
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(PATIENCE)
        sock.connect((host, int(port)))
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n"
        if key := self.client.headers.get("authorization"):
            head += f"Authorization: {key}\r\n"
        sock.sendall(f"{head}\r\n".encode() + raw)
        return sock


@contextlib.contextmanager
def serving(
    engine: Any = None,
    template: ChatTemplate | UnusableTemplate | None = None,
    sessions: Any = None,
    **settings: Any,
) -> Iterator[Live]:
    """A live server; at its end nothing may be left running."""
    engine = engine or FakeEngine()
    config = ServerConfig(port=0, **settings)
    async_engine = AsyncEngine(
        engine, partial(EngineWorker, engine), AdmissionQueue.of(config), config.stream_buffer_bytes
    )
    sessions = sessions or (FakeSessions() if "sessions" in engine.capabilities else None)
    app = create_app(async_engine, config, load_api_keys(config), sessions, template)
    tls, table = tls_context(config), connection_table(config, -1)
    wire = uvicorn.Config(
        app,
        log_config=None,
        ws="none",
        http=bounded(config, table),
        ssl_context_factory=None if tls is None else lambda *_: tls,
    )
    server = BoundedServer(wire, table)
    opened = contextlib.ExitStack()
    sock = opened.enter_context(listening(config))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)  # or stalling takes megabytes
    url = "http://localhost" if config.uds else url_of(sock, has_tls=tls is not None)
    wire_of_client = httpx.HTTPTransport(uds=config.uds, verify=False)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        # Without verify=False it would read the certificates of all authorities, for plain HTTP.
        with httpx.Client(base_url=url, timeout=PATIENCE, transport=wire_of_client) as client:
            yield Live(
                engine, async_engine, sessions, app.state.context.turn_queue, url, client, server
            )
    finally:
        if isinstance(engine, FakeEngine):  # a test that failed may have left it waiting
            engine.may_step.set()
        server.should_exit = True
        thread.join(PATIENCE)
        opened.close()
    assert not thread.is_alive()


PATIENCE = 60.0
"""Seconds after which something hangs, on a machine that does other things as well."""


def eventually(read: Callable[[], Any], *, equals: Any = True, seconds: float = PATIENCE) -> None:
    """Wait until what `read` returns is true, or equals a given value."""
    deadline = time.monotonic() + seconds
    while (value := read()) != equals and not (equals is True and value):
        assert time.monotonic() < deadline, f"after {seconds:.0f} s it is still {value!r}"
        time.sleep(0.005)
