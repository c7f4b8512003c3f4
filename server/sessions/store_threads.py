"""Threads in which the event loop waits for the store of sessions.

They are apart from those of `asyncio.to_thread`, which process bodies and events: a database that
is slow or away holds requests with a session, and no others.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import ParamSpec, TypeVar

NUM_THREADS = 64
"""Started as they are needed. A turn that ends while the database is away waits in one of them."""

Params = ParamSpec("Params")
T = TypeVar("T")

_threads = ThreadPoolExecutor(NUM_THREADS, "session-calls")


async def in_store_thread(
    call: Callable[Params, T], *args: Params.args, **kwargs: Params.kwargs
) -> T:
    """What `call` returns, which waits for the store. It cannot be cancelled, as a thread."""
    context, loop = copy_context(), asyncio.get_running_loop()
    return await loop.run_in_executor(_threads, lambda: context.run(call, *args, **kwargs))
