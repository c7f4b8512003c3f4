"""Cancelling a request by its id, before its generation begins or while it runs.

`Cancellation` is one request's; `RunningRequests` finds it by the id of its answer or the one that
the client gave it. Both run on the event loop.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Literal, TypeVar

from cottention.engine.outputs import FinishReason
from cottention.server.generation.output_stream import OutputStream
from cottention.server.http.errors import ApiError

CancelStatus = Literal["cancelled", "cancelling", "completed"]
"""What became of a request: it was cancelled, it still ends, or it had ended before."""

CANCEL_SECONDS = 5.0
"""How long the answer to a cancellation waits for the end; it takes a step of the engine."""

MAX_ENDED = 2048
"""Ids of ended requests that are known for each owner: a cancellation may be repeated, or late.

A request has two."""

Result = TypeVar("Result")


def request_cancelled() -> ApiError:
    """A 400 for a request that was cancelled before there was anything to answer."""
    return ApiError(400, "the request was cancelled before it began", code="request_cancelled")


class Cancellation:
    """One request, as far as it can be cancelled. `end` must be called if no stream is attached."""

    def __init__(
        self,
        cancel_stream: Callable[[OutputStream], None],
        on_end: Callable[["Cancellation"], None] = lambda _: None,
    ) -> None:
        """cancel_stream: `AsyncEngine.cancel`. on_end: called once, when it has ended."""
        self._cancel_stream = cancel_stream
        self._on_end = on_end
        self._stream: OutputStream | None = None
        self._waiting: asyncio.Timeout | None = None
        self._ended = asyncio.Event()
        self.is_requested = False

    @property
    def is_running(self) -> bool:
        """Whether there is anything to cancel."""
        is_generated = self._stream is not None and self._stream.is_finished
        return not self._ended.is_set() and not is_generated

    @property
    def status(self) -> CancelStatus:
        """What became of the request after `request`."""
        if self.is_running:
            return "cancelling"
        reasons = [FinishReason.ABORT] if self._stream is None else self._stream.reasons
        is_cut = self.is_requested and FinishReason.ABORT in reasons
        return "cancelled" if is_cut else "completed"

    def request(self) -> None:
        """Cancel the request if it is running. Idempotent."""
        if not self.is_running or self.is_requested:
            return
        self.is_requested = True
        if self._stream is not None:
            self._cancel_stream(self._stream)
        elif self._waiting is not None:
            self._waiting.reschedule(asyncio.get_running_loop().time())

    def attach(self, stream: OutputStream) -> None:
        """The request's generation has begun; it ends at the latest when its stream is closed."""
        self._stream = stream
        stream.on_closed = self.end
        if self.is_requested:
            self._cancel_stream(stream)

    def end(self) -> None:
        """The request has ended. Idempotent."""
        if not self._ended.is_set():
            self._ended.set()
            self._on_end(self)

    async def wait(self) -> CancelStatus:
        """The status when generation has ended, or after CANCEL_SECONDS."""
        ended = self._ended if self._stream is None else self._stream
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CANCEL_SECONDS):
                await (ended.wait() if isinstance(ended, asyncio.Event) else ended.wait_ended())
        return self.status

    @contextlib.asynccontextmanager
    async def entered(self, manager: AbstractAsyncContextManager[Result]) -> AsyncIterator[Result]:
        """`manager`, if it can be entered before the request is cancelled. Raises ApiError 400."""
        async with contextlib.AsyncExitStack() as stack:
            yield await self._unless_cancelled(stack.enter_async_context(manager))

    async def _unless_cancelled(self, work: Awaitable[Result]) -> Result:
        try:
            async with asyncio.timeout(None) as self._waiting:
                return await work
        except TimeoutError:
            raise request_cancelled() from None
        finally:
            self._waiting = None


class RunningRequests:
    """The requests of all owners that run, and the ids of those that ended last."""

    def __init__(self, cancel_stream: Callable[[OutputStream], None]) -> None:
        """cancel_stream: `AsyncEngine.cancel`."""
        self._cancel_stream = cancel_stream
        self._running: dict[tuple[str, str], list[Cancellation]] = {}
        self._ended: dict[str, OrderedDict[str, CancelStatus]] = {}

    def open(self, owner: str, answer_id: str, request_id: str, *, is_chosen: bool) -> Cancellation:
        """A request that begins, to be found by `request_id` and by the id of its answer.

        is_chosen: the client gave this id in the body, and no other that is running may have it;
        those of X-Request-Id may repeat, and are cancelled together.
        Raises ApiError 409.
        """
        names = (request_id, answer_id)
        keys = [(owner, name) for name in names]
        if is_chosen and any(each.is_running for key in keys for each in self._found(key)):
            message = (
                "a request of this request_id is running: choose another, or cancel it with"
                f" POST /v1/requests/{request_id}/cancel"
            )
            raise ApiError(409, message, param="request_id", code="request_id_in_use")

        def on_end(ended: Cancellation) -> None:
            for key in keys:
                self._running[key].remove(ended)
                if not self._running[key]:
                    del self._running[key]
                self._note_ended(*key, ended.status)

        cancellation = Cancellation(self._cancel_stream, on_end)
        for key in keys:
            self._running.setdefault(key, []).append(cancellation)
        return cancellation

    async def cancel(self, owner: str, name: str) -> CancelStatus | None:
        """Cancel an owner's requests of this id, and wait for their end; None: there is no such id.

        name: the id of an answer, or the part of it that the client gave.
        """
        found = [each for each in self._found((owner, name)) if each.is_running]
        for each in found:
            each.request()
        statuses = await asyncio.gather(*(each.wait() for each in found))
        for status in ("cancelling", "cancelled"):
            if status in statuses:
                return status
        if statuses or self._found((owner, name)):
            return "completed"
        ended = self._ended.get(owner)
        return None if ended is None else ended.get(name)

    def _found(self, key: tuple[str, str]) -> list[Cancellation]:
        return self._running.get(key, [])

    def _note_ended(self, owner: str, name: str, status: CancelStatus) -> None:
        ended = self._ended.setdefault(owner, OrderedDict())
        ended[name] = status
        ended.move_to_end(name)
        if len(ended) > MAX_ENDED:
            ended.popitem(last=False)
