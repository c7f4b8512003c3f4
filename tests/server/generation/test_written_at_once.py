"""Outputs that a stream's writer has in place of its reader: when, and what the reader has."""

import asyncio
from typing import Any

import pytest

from cottention.engine.outputs import FinishReason, Output
from cottention.server.generation.output_stream import OutputStream
from cottention.server.generation.sse import EventFormatter
from cottention.server.http.answer_writer import AnswerWriter
from tests.server.live import serving


class Written:
    """A writer that keeps what it has sent, or has nothing while it is not ready."""

    def __init__(self) -> None:
        self.is_ready = True
        self.texts: list[str] = []
        self.nums_tokens: list[int] = []
        self._text = ""

    def write(self, _: int, output: Output, num_tokens: int) -> bool:
        if self.is_ready:
            self._text += output.text
            self.nums_tokens.append(num_tokens)
        return self.is_ready

    def send(self) -> None:
        self.texts.append(self._text)
        self._text = ""


def stream_with(written: Written, num_choices: int = 1) -> OutputStream:
    made = OutputStream(num_choices, lambda _: None, lambda _: None)
    made.writer = written
    return made


def step(stream: OutputStream, *texts: str, reason: FinishReason | None = None) -> None:
    """A step of the engine with a text for each choice."""
    is_any_written = False
    for choice, text in enumerate(texts):
        output = Output("r", choice, text, (1,), reason)
        if stream.write(choice, output):
            is_any_written = True
        else:
            stream.deliver(choice, output)
    if is_any_written:
        stream.send()


async def waiting(stream: OutputStream, idle_seconds: float | None = None) -> "asyncio.Task[Any]":
    """A reader that waits in `take`."""
    task = asyncio.create_task(stream.take(idle_seconds))
    await asyncio.sleep(0)
    return task


def test_a_step_is_sent_once_and_nobody_is_woken() -> None:
    async def run() -> None:
        written = Written()
        stream = stream_with(written, num_choices=2)
        reader = await waiting(stream)
        step(stream, "a", "b")
        step(stream, "c", "d")
        await asyncio.sleep(0)
        assert (written.texts, reader.done()) == (["ab", "cd"], False)
        stream.close()
        await asyncio.gather(reader, return_exceptions=True)

    asyncio.run(run())


def test_nothing_overtakes_what_the_reader_has_taken_or_will_take() -> None:
    """Before the reader waits, and after it was woken, output is its own."""

    async def run() -> None:
        written = Written()
        stream = stream_with(written)
        step(stream, "a")
        assert (await stream.take())[0].text == "a"
        step(stream, "b")  # meanwhile the reader sends
        reader = await waiting(stream)
        assert (await reader)[0].text == "b"
        reader, written.is_ready = await waiting(stream), False
        step(stream, "c")  # wakes the reader
        written.is_ready = True
        step(stream, "d")
        assert (await reader)[0].text == "cd"
        assert written.texts == []

    asyncio.run(run())


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.ERROR])
def test_the_end_is_the_reader_s(reason: FinishReason) -> None:
    async def run() -> None:
        written = Written()
        stream = stream_with(written)
        reader = await waiting(stream)
        step(stream, "a", reason=reason)
        assert (await reader)[0].finish_reason is reason
        assert written.texts == []

    asyncio.run(run())


def test_tokens_without_text_are_counted_with_the_text_that_follows() -> None:
    async def run() -> None:
        written = Written()
        stream = stream_with(written)
        reader = await waiting(stream)
        for text in ("", "", "a", "b"):
            step(stream, text)
        assert (written.nums_tokens, stream.num_generated) == ([3, 1], 4)
        step(stream, "")
        step(stream, "c", reason=FinishReason.LENGTH)
        assert (await reader)[0].num_tokens == 2

    asyncio.run(run())


def test_a_stream_whose_engine_dies_wakes_its_reader() -> None:
    async def run() -> None:
        stream = stream_with(Written())
        reader = await waiting(stream)
        stream.fail()
        assert (await reader)[0].finish_reason is FinishReason.ERROR

    asyncio.run(run())


def test_the_idle_time_begins_anew_with_what_is_written() -> None:
    """Else a comment would be sent although there are events all the time."""

    async def run() -> None:
        stream = stream_with(Written())
        reader = await waiting(stream, idle_seconds=3600)
        step(stream, "a")
        stream._on_idle(3600)
        await asyncio.sleep(0)
        assert not reader.done()
        stream._written_at -= 3600
        stream._on_idle(3600)
        assert await reader == {}

    asyncio.run(run())


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What answers' writers have written since."""
    written: list[str] = []
    write = AnswerWriter.write

    def noted(self: AnswerWriter, part: str) -> None:
        written.append(part)
        write(self, part)

    monkeypatch.setattr(AnswerWriter, "write", noted)
    return written


def test_tokens_of_a_stream_are_written_at_once_and_the_answer_is_whole(parts: list[str]) -> None:
    with serving() as live:
        live.step_with_loop()
        events = live.events(prompt="say:abcdefgh", max_tokens=99)
        assert "".join(each["choices"][0]["text"] for each in events[:-1]) == "abcdefgh"
        assert events[-1] == "[DONE]"
        assert len(parts) >= 4
        parts.clear()
        session = live.opened()
        events = live.events(session_id=session, prompt="say:abcdefgh", max_tokens=99)
        assert "".join(each["choices"][0]["text"] for each in events[:-1]) == "abcdefgh"
        assert len(parts) >= 4
        assert live.text_of(session) == "say:abcdefghabcdefgh"


def test_a_part_that_cannot_be_made_ends_its_own_answer_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = EventFormatter.write

    def broken(self: EventFormatter, index: int, output: Output, *more: Any) -> bool:
        if "c" in output.text:
            raise ValueError("broken")
        return write(self, index, output, *more)

    monkeypatch.setattr(EventFormatter, "write", broken)
    with serving() as live:
        live.step_with_loop()
        assert "error" in live.events(prompt="say:abcdefgh", max_tokens=99)[-1]
        assert live.events(prompt="say:1234", max_tokens=99)[-1] == "[DONE]"
