"""A stop at any moment of a request's life: each request that has no answer yet gets a 503.

A real process and a real SIGTERM; what the requests wait for does not come before they are
answered (tests/server/held_main.py).
"""

import http.client
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from tests.server.held_main import HELD_CHAT, HELD_TEXT

ROOT = Path(__file__).parents[3]
PATIENCE = 60.0
LONG = HELD_TEXT + " " * 20_000
"""Tokenized in a thread also where short texts are not."""


class Moment(NamedTuple):
    """A request, and whether the server prints a line where it begins to wait."""

    what: str
    path: str
    body: dict[str, Any]
    prints: bool = True


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 5} | more


def moments(session: str, busy: str) -> list[Moment]:
    """What can be waited for, at each endpoint. busy: a session whose turn never ends."""
    of_busy = {"session_id": busy, "on_conflict": "wait"}
    detached = {"session_id": session, "on_disconnect": "continue"}
    completions, chats, sessions = "/v1/completions", "/v1/chat/completions", "/v1/sessions"
    return [
        Moment("tokenizer", completions, {"prompt": LONG}),
        Moment("tokenizer", completions, {"prompt": [LONG, "x"], "stream": True}),
        Moment("tokenizer", chats, chat(HELD_TEXT)),
        Moment("tokenizer", chats, chat(HELD_TEXT, stream=True)),
        Moment("tokenizer", "/tokenize", {"prompt": HELD_TEXT}),
        Moment("tokenizer", sessions, {"prompt": HELD_TEXT}),
        Moment("tokenizer", f"{sessions}/{session}/append", {"prompt": HELD_TEXT}),
        Moment("template", chats, chat(HELD_CHAT)),
        Moment("template", chats, chat(HELD_CHAT, stream=True)),
        Moment("template", "/tokenize", chat(HELD_CHAT) | {"max_tokens": None}),
        Moment("session", completions, {"prompt": "x"} | of_busy, prints=False),
        Moment("session", completions, {"prompt": "x", "stream": True} | of_busy, prints=False),
        Moment("session", chats, chat("x", **of_busy), prints=False),
        Moment(
            "session",
            f"{sessions}/{busy}/append",
            {"prompt": "x", "on_conflict": "wait"},
            prints=False,
        ),
        Moment("session", f"{sessions}/{busy}/fork", {"on_conflict": "wait"}, prints=False),
        Moment("engine", completions, {"prompt": "x"}),
        Moment("engine", completions, {"prompt": "x", "n": 3}),
        Moment("engine", completions, {"prompt": "x"} | detached),
        Moment("engine", chats, chat("x")),
        Moment("engine", sessions, {"prompt": "x"}),
        Moment("store", sessions, {"metadata": {"a": "b"}}),
        Moment("store", f"{sessions}/import", {}),
    ]


class Waiting:
    """A connection whose request has no answer yet."""

    def __init__(self, address: tuple[str, int], path: str) -> None:
        self._sock = socket.create_connection(address, PATIENCE)
        self._path = path

    def send(self, body: dict[str, Any]) -> None:
        """Send a whole request."""
        raw = json.dumps(body).encode()
        self._sock.sendall(self._head(len(raw)) + b"\r\n" + raw)

    def send_half(self) -> None:
        """Send half of a body, after the server has said that it reads it."""
        self._sock.sendall(self._head(100) + b"Expect: 100-continue\r\n\r\n")
        assert self._sock.recv(100).startswith(b"HTTP/1.1 100 ")
        self._sock.sendall(b'{"prompt": ')

    def answer(self) -> tuple[int, str | None, str | None, str]:
        """Status, Retry-After, type and text of the answer."""
        response = http.client.HTTPResponse(self._sock, method="POST")
        response.begin()
        text = response.read().decode()
        found = response.getheader("retry-after"), response.getheader("content-type")
        self._sock.close()
        return response.status, *found, text

    def _head(self, length: int) -> bytes:
        lines = f"POST {self._path} HTTP/1.1", "Host: x", f"Content-Length: {length}", ""
        return "\r\n".join(lines).encode()


def test_every_request_without_an_answer_gets_a_503() -> None:
    command = [sys.executable, "-m", "tests.server.held_main", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as popen:
        try:
            assert popen.stdout
            url = httpx.URL(popen.stdout.readline().strip())
            address = url.host, url.port or 80
            with httpx.Client(base_url=url, timeout=PATIENCE) as client:
                session, busy, other = (
                    client.post("/v1/sessions", json={}).json()["id"] for _ in range(3)
                )
                paths = client.get("/openapi.json").json()["paths"]
            waiting: dict[str, Waiting] = {}

            def send(moment: Moment) -> None:
                name = f"{len(waiting)} {moment.what} {moment.path}"
                waiting[name] = Waiting(address, moment.path)
                waiting[name].send(moment.body)
                if moment.prints:
                    assert popen.stdout
                    assert popen.stdout.readline() == "held\n"

            send(Moment("engine", "/v1/completions", {"prompt": "x", "session_id": busy}))
            for moment in moments(session, busy):
                send(moment)
            send(Moment("store", f"/v1/sessions/{other}/fork", {}))
            answered_at_once = {"/v1/embeddings", "/v1/fill-mask"}  # not what the model can do
            posts = [path for path, methods in paths.items() if "post" in methods]
            posts = [path for path in posts if path not in answered_at_once]
            assert len(posts) >= 9
            for path in posts:
                name = f"body {path}"
                waiting[name] = Waiting(address, path.replace("{session_id}", session))
                waiting[name].send_half()
            popen.send_signal(signal.SIGTERM)
            wrong = {}
            for name, one in waiting.items():
                status, retry, kind, text = one.answer()
                error = json.loads(text)["error"]
                told = error.get("code") or error["type"]  # the second in Anthropic's form
                if (status, retry, kind) != (503, "5", "application/json") or (
                    told not in ("unavailable", "overloaded_error")
                ):
                    wrong[name] = status, retry, kind, text
            assert wrong == {}
            popen.send_signal(signal.SIGUSR1)
            assert popen.wait(PATIENCE) == 0
        finally:
            popen.kill()
