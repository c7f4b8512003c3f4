"""A response that is made once: what its readers get, and what is kept of it."""

import asyncio
from typing import Any

import pytest

from cottention.server.generation.sse import DONE, KEEP_ALIVE, body_message
from cottention.server.http.errors import ApiError
from cottention.server.idempotency import recording as module
from cottention.server.idempotency.recording import Recording, replayed

START: dict[str, Any] = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json")],
}
STREAM = START | {"headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}


async def read_all(recording: Recording, reader: object) -> bytes:
    read = b""
    while piece := await recording.piece(reader):
        read += piece
    return read


def test_who_reads_slowly_is_waited_for_and_then_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory stays bounded, readers get every byte or are cut, and others go on."""
    monkeypatch.setattr(module, "BUFFER_BYTES", 100)
    monkeypatch.setattr(module, "STALL_SECONDS", 0.2)

    async def run() -> None:
        recording = Recording(max_bytes=50)
        recording.attach("quick")
        recording.attach("stalled")
        quick = asyncio.create_task(read_all(recording, "quick"))
        await recording.send(START)
        for n in range(40):
            await recording.send(body_message(b"%09d," % n, more_body=n < 39))
        recording.end()
        assert await quick == b"".join(b"%09d," % n for n in range(40))
        with pytest.raises(ConnectionResetError):
            await read_all(recording, "stalled")
        with pytest.raises(ApiError):
            recording.attach("late")
        assert recording.answer is not None
        with pytest.raises(ApiError):
            replayed(recording.answer)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("start", "bodies", "is_kept"),
    [
        (START, [b"{}"], True),
        (START | {"status": 400}, [b"{}"], False),
        (STREAM, [b"data: 1\n\n", KEEP_ALIVE, DONE.encode()], True),
        (STREAM, [b'data: {"error": 1}\n\n'], False),
        (STREAM, [b"id: t-0\ndata: 1\n\n", b"id: t-1\n" + DONE.encode()], True),
        (STREAM, [b"data: 1\n\nevent: response.completed\ndata: {}\n\n"], True),
        (STREAM, [b"id: t-0\nevent: response.incomplete\ndata: {}\n\n"], True),
        (STREAM, [b"id: t-0\nevent: response.failed\ndata: {}\n\n"], False),
        (STREAM, [b"event: response.completed\ndata: {}\n\n", b"data: 1\n\n"], False),
        (STREAM, [b"event: message_stop\ndata: {}\n\n"], True),
        (STREAM, [b"event: error\ndata: {}\n\n"], False),
    ],
)
def test_successes_are_kept_without_comments(
    start: Any, bodies: list[bytes], is_kept: bool
) -> None:
    """An error in the middle of a stream must not be repeated for a day."""

    async def run() -> bytes | None:
        recording = Recording(1000)
        await recording.send(start)
        for body in bodies:
            await recording.send(body_message(body, more_body=True))
        await recording.send(body_message(b"", more_body=False))
        recording.end()
        return recording.answer

    answer = asyncio.run(run())
    assert (answer is not None) == is_kept
    if answer is not None:
        expected = b"".join(body for body in bodies if body != KEEP_ALIVE)
        assert bytes(replayed(answer).body) == expected


def test_what_is_cut_is_told_so() -> None:
    async def run() -> None:
        recording = Recording(1000)
        recording.attach("one")
        await recording.send(START)
        await recording.send(body_message(b"{", more_body=True))
        recording.end(OSError("gone"))
        assert await recording.piece("one") == b"{"
        with pytest.raises(ConnectionResetError):
            await recording.piece("one")
        assert recording.answer is None

    asyncio.run(run())
