"""A quick load test of a server with OpenAI's interface: streams at several levels of concurrency.

Every prompt is different, so that no server answers from a cache.
"""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx2

from cottention.server.client.client import (
    RemoteError,
    address_of,
    headers_of,
    message_of,
    unreachable,
)
from cottention.server.client.conversation import choices_of, text_of

CONNECT_SECONDS = 10.0

WORDS = ("time", "year", "people", "way", "day", "thing", "life", "world", "school", "part", "work")


@dataclass(frozen=True, slots=True)
class Load:
    """What each request asks for."""

    model: str
    is_chat: bool
    prompt_words: int
    max_tokens: int


@dataclass(slots=True)
class Streamed:
    """One answer, in seconds since its request began. gaps: between pieces, for each token."""

    first: float | None = None
    seconds: float = 0.0
    num_prompt: int = 0
    num_tokens: int = 0
    gaps: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of times, in seconds; None where there are none."""

    p50: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, times: Sequence[float]) -> "Percentiles":
        """By nearest rank: each is one of the times."""
        ordered = sorted(times)
        last = len(ordered) - 1
        ranks = [min(last, int(share * len(ordered))) for share in (0.5, 0.95, 0.99)]
        return cls(*(ordered[rank] if ordered else None for rank in ranks))


@dataclass(frozen=True, slots=True)
class Level:
    """What one level of concurrency gave. Times are in seconds.

    first_tokens, gaps: of all requests; first_token and per_token are their percentiles.
    error: why the first of the failed requests failed.
    """

    concurrency: int
    num_requests: int
    num_failed: int
    error: str | None
    seconds: float
    num_prompt_tokens: int
    num_tokens: int
    first_tokens: Sequence[float]
    gaps: Sequence[float]

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all streams together."""
        return self.num_tokens / self.seconds

    @property
    def first_token(self) -> Percentiles:
        """Time to the first token."""
        return Percentiles.of(self.first_tokens)

    @property
    def per_token(self) -> Percentiles:
        """Time per token after the first."""
        return Percentiles.of(self.gaps)

    def as_json(self) -> dict[str, Any]:
        """Everything but the single times."""
        return {
            "concurrency": self.concurrency,
            "requests": self.num_requests,
            "failed": self.num_failed,
            "error": self.error,
            "seconds": self.seconds,
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "tokens_per_second": self.tokens_per_second,
            "requests_per_second": (self.num_requests - self.num_failed) / self.seconds,
            "seconds_to_first_token": asdict(self.first_token),
            "seconds_per_token": asdict(self.per_token),
        }


class LoadTest:
    """Sends requests to one server. Raises ConfigurationError for what is no URL."""

    def __init__(self, url: str, key: str | None, load: Load) -> None:
        self._url, self._load = url, load
        self._base, self._socket = address_of(url)
        self._headers = headers_of(key)
        self._prompts = _prompts(load.prompt_words)

    def run(self, concurrency: int, num_requests: int, report: Callable[[int, int], None]) -> Level:
        """One level: so many requests, of which `concurrency` are under way at a time."""
        return asyncio.run(self._run(concurrency, num_requests, report))

    async def _run(
        self, concurrency: int, num_requests: int, report: Callable[[int, int], None]
    ) -> Level:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        wire: dict[str, Any] = {"limits": limits}
        if self._socket is not None:
            wire = {"transport": httpx2.AsyncHTTPTransport(uds=self._socket, limits=limits)}
        answers: list[Streamed] = []
        errors: list[str] = []
        left = iter(range(num_requests))
        timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)
        async with httpx2.AsyncClient(
            base_url=self._base, headers=self._headers, timeout=timeout, **wire
        ) as client:

            async def work() -> None:
                for _ in left:
                    try:
                        answers.append(await self._ask(client))
                    except RemoteError as error:
                        errors.append(str(error))
                    report(len(answers) + len(errors), num_requests)

            began = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(min(concurrency, num_requests))))
            seconds = time.perf_counter() - began
        return Level(
            concurrency,
            num_requests,
            len(errors),
            errors[0] if errors else None,
            seconds,
            sum(each.num_prompt for each in answers),
            sum(each.num_tokens for each in answers),
            [each.first for each in answers if each.first is not None],
            [gap for each in answers for gap in each.gaps],
        )

    async def _ask(self, client: httpx2.AsyncClient) -> Streamed:
        """One request. Raises RemoteError."""
        path, body = self._request()
        began = time.perf_counter()
        try:
            async with client.stream("POST", path, json=body) as response:
                if not response.is_success:
                    raise _refused(await response.aread(), response)
                return await self._read(response, began)
        except (httpx2.HTTPError, OSError) as error:
            raise unreachable(self._url, error) from None

    async def _read(self, response: httpx2.Response, began: float) -> Streamed:
        answer, times = Streamed(), []
        async for line in response.aiter_lines():
            data = line.removeprefix("data:").strip()
            if not line.startswith("data:") or data == "[DONE]":
                continue
            now = time.perf_counter()
            try:
                chunk = json.loads(data)
            except ValueError:
                chunk = None
            if not isinstance(chunk, dict):
                raise RemoteError(f"{self._url} does not stream JSON objects as OpenAI's API does")
            if chunk.get("error"):
                raise RemoteError(message_of(chunk) or "the answer ended with an error")
            if isinstance(usage := chunk.get("usage"), dict):
                answer.num_prompt = usage.get("prompt_tokens") or 0
                answer.num_tokens = usage.get("completion_tokens") or 0
            if any(map(_has_text, choices_of(chunk))):
                times.append(now)
        answer.seconds = time.perf_counter() - began
        if times:
            answer.first = times[0] - began
            answer.num_tokens = answer.num_tokens or len(times)
            # a piece may have several tokens: a reader or the server was slow
            share = (len(times) - 1) / max(1, answer.num_tokens - 1)
            answer.gaps = [(after - before) * share for before, after in itertools.pairwise(times)]
        return answer

    def _request(self) -> tuple[str, dict[str, Any]]:
        load, prompt = self._load, next(self._prompts)
        body = {
            "model": load.model,
            "max_tokens": load.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if load.is_chat:
            messages = [{"role": "user", "content": prompt}]
            return "/v1/chat/completions", body | {"messages": messages}
        return "/v1/completions", body | {"prompt": prompt}


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(text_of(choice) or delta.get("reasoning_content"))


def _refused(raw: bytes, response: httpx2.Response) -> RemoteError:
    try:
        text = message_of(json.loads(raw))
    except ValueError:
        text = ""
    path = response.request.url.path
    return RemoteError(text or f"{path} is answered with {response.status_code}")


def _prompts(num_words: int) -> Iterator[str]:
    """Texts of so many words, each with another beginning."""
    draw = random.Random(0)
    while True:
        yield " ".join((str(draw.getrandbits(32)), *draw.choices(WORDS, k=num_words - 1)))
