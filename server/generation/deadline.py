"""Deadlines of requests. They hold from a request's arrival: also while its prompts are tokenized,
while it waits for its session, and while it is submitted.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from starlette.types import Receive

from cottention.server.config import ServerConfig
from cottention.server.generation.sse import until_done
from cottention.server.http.errors import expired

Result = TypeVar("Result")


def deadline_of(
    arrived_at: float, config: ServerConfig, timeout: float | None = None
) -> float | None:
    """When a request ends that arrived then, by the shorter of its own timeout and the server's."""
    limits = (timeout, config.max_request_seconds)
    seconds = min((each for each in limits if each is not None), default=None)
    return None if seconds is None else arrived_at + seconds


def timeout_of(fields: Mapping[str, Any]) -> float | None:
    """The `timeout` of a body that has not been validated yet; None where it has no valid one."""
    timeout: Any = fields.get("timeout")
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not is_number or not 0 < timeout < math.inf:
        return None
    try:
        return float(timeout)
    except OverflowError:  # an integer that no float is as large as
        return None


async def before_deadline(deadline: float | None, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled at the deadline. Raises ApiError 504."""
    try:
        async with asyncio.timeout_at(deadline):
            return await work
    except TimeoutError:
        raise expired() from None


@contextlib.asynccontextmanager
async def entered_before(
    deadline: float | None, manager: AbstractAsyncContextManager[Result]
) -> AsyncIterator[Result]:
    """`manager`, if it can be entered before the deadline. Raises ApiError 504."""
    async with contextlib.AsyncExitStack() as stack:
        yield await before_deadline(deadline, stack.enter_async_context(manager))


async def wait_for_client(
    deadline: float | None, receive: Receive, work: Coroutine[Any, Any, Result]
) -> Result:
    """The result of `work`, which runs in a thread and cannot be cancelled.

    It ends in the background where the wait for it ends before. Raises ApiError 504 at the
    deadline, OutputStreamClosed where the client disconnects, and what `work` raises.
    """
    task = asyncio.create_task(work)
    task.add_done_callback(_ignore_error)
    await before_deadline(deadline, until_done(task, receive))
    return task.result()


def _ignore_error(task: asyncio.Task[Any]) -> None:
    """Nobody may be left to raise it for; asyncio would log it."""
    if not task.cancelled():
        task.exception()
