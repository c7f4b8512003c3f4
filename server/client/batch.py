"""The requests of a batch, some at a time, until each has its answer in the output."""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2

from cottention.server.client.batch_files import (
    BatchAnswer,
    BatchInput,
    BatchOutput,
    BatchRequest,
)
from cottention.server.client.client import (
    CONNECT_SECONDS,
    RemoteError,
    address_of,
    headers_of,
    unreachable,
)

BUSY = (429, 502, 503)
"""Answers by which a server, or a proxy before it, asks to try again."""

MAX_ATTEMPTS = 12
MAX_WAIT_SECONDS = 60.0


class BatchRun:
    """Asks one server. Raises ConfigurationError for what is no URL."""

    def __init__(self, url: str, key: str | None, max_concurrency: int) -> None:
        self._url = url
        self._base, self._socket = address_of(url)
        self._headers = headers_of(key) | {"content-type": "application/json"}
        self._max_concurrency = max_concurrency

    def run(
        self, batch: BatchInput, output: BatchOutput, report: Callable[[int, int], None]
    ) -> None:
        """Make the requests that have no answer yet.

        Raises RemoteError where the server cannot be reached any more; what has been answered by
        then is in the output.
        """
        asyncio.run(self._run(batch, output, report))

    async def _run(
        self, batch: BatchInput, output: BatchOutput, report: Callable[[int, int], None]
    ) -> None:
        left = batch.requests(dict(output.done))
        num_workers = min(self._max_concurrency, len(batch.places) - len(output.done))
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        wire: dict[str, Any] = {"limits": limits}
        if self._socket is not None:
            wire = {"transport": httpx2.AsyncHTTPTransport(uds=self._socket, limits=limits)}
        timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)
        async with httpx2.AsyncClient(
            base_url=self._base, headers=self._headers, timeout=timeout, **wire
        ) as client:

            async def work(requests: Iterator[BatchRequest]) -> None:
                for request in requests:
                    answer = await self._answered(client, request)
                    output.write(request.custom_id, answer)
                    report(len(output.done), len(batch.places))

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(num_workers):
                        group.create_task(work(left))
            except ExceptionGroup as errors:  # the first fault ends all
                raise errors.exceptions[0] from None

    async def _answered(self, client: httpx2.AsyncClient, request: BatchRequest) -> BatchAnswer:
        """The answer to a request, which is sent again while the server is busy. RemoteError."""
        raw = json.dumps(request.body).encode()
        wait = 1.0
        for attempt in range(1, MAX_ATTEMPTS + 1):
            is_last = attempt == MAX_ATTEMPTS
            try:
                response = await client.post(request.url, content=raw)
            except httpx2.HTTPError as error:
                if is_last or isinstance(error, httpx2.ConnectError):
                    raise unreachable(self._url, error) from None
                delay = wait
            else:
                if response.status_code not in BUSY or (is_last and response.status_code == 429):
                    return _answer(response)
                if is_last:
                    reason = f"it answers {request.url} with {response.status_code}"
                    raise RemoteError(f"{self._url} is not available: {reason}")
                delay = _asked_delay(response) or wait
            await asyncio.sleep(min(delay, MAX_WAIT_SECONDS))
            wait = min(2 * wait, MAX_WAIT_SECONDS)
        raise AssertionError("the last attempt returns or raises")


def _asked_delay(response: httpx2.Response) -> float:
    """Seconds of Retry-After; 0 without."""
    asked = response.headers.get("retry-after", "")
    return float(asked) if asked.isascii() and asked.isdecimal() else 0.0


def _answer(response: httpx2.Response) -> BatchAnswer:
    body: Any
    try:
        body = json.loads(response.content)
    except ValueError:  # a proxy's page
        body = {"error": {"message": response.text}}
    own = body.get("id") if isinstance(body, dict) else None
    request_id = response.headers.get("x-request-id") or str(own or "")
    return BatchAnswer(response.status_code, request_id, body)
