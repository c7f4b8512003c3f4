"""Clients of the soak test: well-behaved ones, and ones that disconnect, stall or send garbage.

They use plain sockets, one connection per request, and record the responses.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

Body = dict[str, Any]

TIMEOUT_SECONDS = 120.0
STALL_SECONDS = (1.0, 8.0)
DISCONNECTED = (ConnectionError, asyncio.IncompleteReadError, asyncio.TimeoutError)


@dataclass(slots=True)
class Responses:
    """Responses to all clients: ids by index of the request body, complete or as far as read."""

    whole: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    parts: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    refused_seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)


def bodies(number: int, num_ids: int, chance: random.Random) -> list[Body]:
    """Different request bodies, each with a seed, so that its response is always the same."""
    return [
        {
            "prompt": [chance.randrange(num_ids) for _ in range(chance.choice([3, 20, 150]))],
            "max_tokens": chance.randrange(8, 65),
            "temperature": chance.choice([0, 1]),
            "seed": seed,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        for seed in range(number)
    ]


class Client:
    """One client with its own rate of requests."""

    def __init__(
        self, port: int, wanted: Sequence[Body], responses: Responses, chance: random.Random
    ) -> None:
        self._port = port
        self._wanted = wanted
        self._responses = responses
        self._chance = chance

    async def run(self, kind: str, seconds_between: float, until: float) -> None:
        """Send requests at random times until `until`; `kind` is the behaviour."""
        work = {"leave": self.leave, "stall": self.stall, "garbage": self.garbage}
        pause = partial(self._chance.expovariate, 1 / seconds_between)
        # random pauses end before `until`, so that clients do not all stop at once
        while (begin := time.monotonic() + pause()) < until:
            await asyncio.sleep(begin - time.monotonic())
            self._responses.kinds[kind] += 1
            with suppress(*DISCONNECTED):
                await work.get(kind, self.behave)()

    async def behave(self) -> None:
        """Send a request and read the whole response."""
        number = self._chance.randrange(len(self._wanted))
        way = self._chance.choice(["stream", "stream", "whole", "turn"])
        if way == "turn":
            await self._turn(number)
        else:
            await self._ask(number, {"stream": way == "stream"})

    async def _turn(self, number: int) -> None:
        """The same as a turn of a new session."""
        status, opened = await self._post("/v1/sessions", {})
        if status == 200:
            name = json.loads(opened)["id"]
            await self._ask(number, {"session_id": name})
            await self._send("DELETE", f"/v1/sessions/{name}", b"")

    async def _ask(self, number: int, more: Body) -> None:
        status, raw = await self._post("/v1/completions", self._wanted[number] | more)
        if status == 200:
            ids = ids_of(raw)
            if not more.get("stream") or b"data: [DONE]" in raw:
                self._responses.whole.append((number, ids))
            else:
                self._responses.faults["cut stream"] += 1
        elif status != 429:
            self._responses.faults[f"status {status}"] += 1

    async def _post(self, path: str, body: Body) -> tuple[int, bytes]:
        return await self._send("POST", path, json.dumps(body).encode())

    async def _send(self, method: str, path: str, raw: bytes) -> tuple[int, bytes]:
        """Status and body of a response; the body as received, possibly chunked."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                began = time.monotonic()
                writer.write(request_of(method, path, raw))
                head = await reader.readuntil(b"\r\n\r\n")
                status = int(head.split(b" ", 2)[1])
                if status == 429:
                    self._responses.refused_seconds.append(time.monotonic() - began)
                return status, await reader.read()
            finally:
                writer.close()

    async def leave(self) -> None:
        """Read a part of a stream, then disconnect."""
        await self._read_some(self._chance.randrange(0, 4000), stall=0.0)

    async def stall(self) -> None:
        """Start a long stream, read nothing for a while, then disconnect."""
        await self._read_some(100, stall=self._chance.uniform(*STALL_SECONDS))

    async def _read_some(self, num_bytes: int, stall: float) -> None:
        number = self._chance.randrange(len(self._wanted))
        raw = json.dumps(self._wanted[number] | {"stream": True}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=4096)
        try:
            began = time.monotonic()
            writer.write(request_of("POST", "/v1/completions", raw))
            async with asyncio.timeout(TIMEOUT_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                if b" 429 " in head[:16]:
                    self._responses.refused_seconds.append(time.monotonic() - began)
                    return
                received = b""
                while len(received) < num_bytes and (more := await reader.read(1000)):
                    received += more
            await asyncio.sleep(stall)
            self._responses.parts.append((number, ids_of(received)))
        finally:
            writer.transport.abort()

    async def garbage(self) -> None:
        """Send bytes that are not a request, or only a part of one."""
        chance = self._chance
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            raw = json.dumps(chance.choice(self._wanted)).encode()
            whole = request_of("POST", "/v1/completions", raw)
            cut = whole[: chance.randrange(len(whole))]
            spoilt = bytearray(whole)
            spoilt[chance.randrange(len(whole))] = chance.randrange(256)
            writer.write(chance.choice([chance.randbytes(2000), cut, bytes(spoilt)]))
            await writer.drain()
            await asyncio.sleep(chance.uniform(0, 1))
        finally:
            writer.transport.abort()


def request_of(method: str, path: str, raw: bytes) -> bytes:
    """A request after which the server closes the connection."""
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw


def ids_of(raw: bytes) -> tuple[int, ...]:
    """Ids in a response, complete or as events, as far as it was read."""
    if b"data: {" not in raw:
        answer = json.loads(raw) if raw.startswith(b"{") else {}
        return tuple(answer["choices"][0]["token_ids"]) if "choices" in answer else ()
    found: list[int] = []
    for line in raw.split(b"\n")[:-1]:  # the last may be cut, behind a "}" too
        if line.startswith(b"data: {"):
            found += json.loads(line[6:])["choices"][0].get("token_ids") or ()
    return tuple(found)
