"""What `server/http/protocol.py` and `listener.py` use of uvicorn beyond its documentation.

A new uvicorn that renames one of these could turn a limit off unnoticed: what it no longer reads
can still be set, and what it no longer calls still be overridden. pyproject.toml bounds uvicorn's
version; raise the bound when these tests pass with the new one.
"""

import ast
import asyncio
import inspect
import socket
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from cottention.server.http import answer_writer, protocol
from cottention.server.http.connections import ConnectionTable
from cottention.server.http.errors import ApiError
from cottention.server.http.listener import BoundedServer

METHODS = {
    "__init__": ("self, config, server_state, app_state, _loop", "one protocol per connection"),
    "connection_made": ("self, transport", "the limit on the time until the first request"),
    "connection_lost": ("self, exc", "notifying the request whose client has left"),
    "data_received": ("self, data", "the limit on bytes outside of bodies"),
    "on_message_begin": ("self", "the limit on a head's time"),
    "on_url": ("self, url", "the limit on a head's bytes"),
    "on_header": ("self, name, value", "the limit on a head's lines"),
    "on_headers_complete": ("self", "the limit on pipelined requests"),
    "on_body": ("self, body", "the limit on what frames a body"),
    "on_message_complete": ("self", "the limit on a body's time after its answer"),
    "on_response_complete": ("self", "the list of unanswered requests"),
    "pause_writing": ("self", "the limit on the time in which a client reads"),
    "resume_writing": ("self", "the end of that time"),
    "_unset_keepalive_if_required": ("self", "stopping the idle timeout when bytes arrive"),
}
"""Methods of HttpToolsProtocol: parameters, and what they are used for."""

ATTRIBUTES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "client": (lambda it: it == ("192.0.2.1", 5), "counting the connections of an address"),
    "parser": (lambda it: type(it) is httptools.HttpRequestParser, "parsing in pieces"),
    "url": (lambda it: it == b"/a?b", "declining an upgrade"),
    "headers": (lambda it: it == [(b"x", b"Y")], "declining an upgrade"),
    "scope": (lambda it: it["path"] == "/a", "passing on what writes parts of an answer"),
    "cycle": (lambda it: type(it) is RequestResponseCycle, "the list of unanswered requests"),
}
"""Attributes of HttpToolsProtocol: whether each is as expected after `HEAD`, and the use."""

CYCLE_ATTRIBUTES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "response_started": (lambda it: it is False, "keeping errors out of other answers"),
    "transport": (lambda it: type(it) is Transport, "answering HTTP/1.0 without chunked coding"),
    "response_complete": (lambda it: it is False, "writing parts of an answer at once"),
    "disconnected": (lambda it: it is False, "writing parts of an answer at once"),
    "chunked_encoding": (lambda it: it is None, "writing parts of an answer at once"),
    "flow": (lambda it: it.write_paused is False, "writing parts of an answer at once"),
}
"""Likewise of RequestResponseCycle."""

HEAD = b"GET /a?b HTTP/1.1\r\nX: Y\r\n\r\n"


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: Any) -> None:
        self.written += data

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("192.0.2.1", 5) if name == "peername" else default

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing to do."""


async def answering(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"answer"})


async def waiting(scope: Any, receive: Any, _send: Any) -> None:
    while True:
        message = await receive()
        scope["state"]["received"].append(message["type"])
        if message["type"] == "http.disconnect":
            return


def connection(app: Any, received: list[str]) -> Any:
    """A connection after HEAD."""
    config = uvicorn.Config(app, log_config=None, ws="none")
    made: Any = HttpToolsProtocol(config, ServerState(), {"received": received})
    made.connection_made(Transport())
    made.data_received(HEAD)
    return made


async def moved_names() -> list[tuple[str, str]]:
    """What is not as it was, and the use of it."""
    moved = []
    for name, (parameters, use) in METHODS.items():
        method = getattr(HttpToolsProtocol, name, None)
        if method is None or ", ".join(inspect.signature(method).parameters) != parameters:
            moved.append((f"HttpToolsProtocol.{name}({parameters})", use))
    made = connection(answering, [])
    for owner, kind, attributes in (
        (made, HttpToolsProtocol, ATTRIBUTES),
        (getattr(made, "cycle", None), RequestResponseCycle, CYCLE_ATTRIBUTES),
    ):
        for name, (is_expected, use) in attributes.items():
            if not hasattr(owner, name) or not is_expected(getattr(owner, name)):
                moved.append((f"{kind.__name__}.{name}", use))
    return moved


async def moved_uses() -> list[tuple[str, str]]:
    """What is still there and not read or called any more, and the use of it."""
    moved = []
    calls = []
    original = HttpToolsProtocol.on_response_complete
    try:
        HttpToolsProtocol.on_response_complete = lambda self: calls.append(self)
        made = connection(answering, [])
    finally:
        HttpToolsProtocol.on_response_complete = original
    made.cycle.transport = replaced = Transport()
    cycle = made.cycle
    await asyncio.gather(*made.tasks)
    if b"answer" not in replaced.written:
        use = CYCLE_ATTRIBUTES["transport"][1]
        moved.append(("writing to RequestResponseCycle.transport", use))
    if cycle.response_started is not True:
        use = CYCLE_ATTRIBUTES["response_started"][1]
        moved.append(("setting RequestResponseCycle.response_started", use))
    if calls != [made]:
        moved.append(("calling on_response_complete", METHODS["on_response_complete"][1]))
    received: list[str] = []
    made = connection(waiting, received)
    tasks, first = list(made.tasks), made.cycle
    made.data_received(HEAD)  # pipelined: `cycle` is the second request now
    made.cycle = first
    made.connection_lost(None)
    await asyncio.wait(tasks, timeout=10)
    if received[-1:] != ["http.disconnect"]:
        moved.append(("notifying `cycle` of its client", METHODS["connection_lost"][1]))
    return moved


def test_uvicorn_has_what_the_protocol_uses_of_it() -> None:
    moved = asyncio.run(moved_names()) or asyncio.run(moved_uses())
    assert not moved, "\n".join(
        f"uvicorn {uvicorn.__version__} moved {what}, which server/http/protocol.py uses for {use}"
        for what, use in moved
    )


def test_the_lists_are_complete() -> None:
    """They name all that the protocol shares with uvicorn; no other name of ours is one of its."""

    async def names_of_uvicorn() -> set[str]:
        made = connection(answering, [])
        return {name for each in (made, made.cycle) for name in (*dir(type(each)), *vars(each))}

    source = ast.parse(Path(protocol.__file__).read_text(encoding="utf-8"))
    ours = [node for node in source.body if getattr(node, "name", "") == "BoundedProtocol"]
    ours += ast.parse(Path(answer_writer.__file__).read_text(encoding="utf-8")).body
    nodes = [node for each in ours for node in ast.walk(each)]
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    for other in (ApiError, asyncio.Transport, deque, httptools.HttpRequestParser):
        used -= {*dir(other)}
    shared = used & asyncio.run(names_of_uvicorn())
    assert shared | {"__init__"} == {*METHODS, *ATTRIBUTES, *CYCLE_ATTRIBUTES}


def test_uvicorn_accepts_no_connections_of_its_own() -> None:
    """Else they would be made before they are counted. It closes the sockets at the end."""

    async def start(sock: socket.socket) -> tuple[Any, Any]:
        config = uvicorn.Config(answering, log_config=None, lifespan="off", http=HttpToolsProtocol)
        server = BoundedServer(config, ConnectionTable(1, 1))
        config.load()
        server.lifespan = config.lifespan_class(config)
        await server.startup([sock])
        of_uvicorn, made = server.servers, server._protocol_factory()()
        await server.shutdown([sock])
        return of_uvicorn, made

    with socket.create_server(("127.0.0.1", 0)) as sock:
        servers, made = asyncio.run(start(sock))
        assert sock.fileno() == -1
    assert servers == []
    assert type(made) is HttpToolsProtocol
