"""Idempotency keys: a request is executed once for each, and its answer repeated for a day.

A request with a key is executed in a task of its own, which does not end with its client. Requests
of the same key that come meanwhile get the same bytes as they are made; those that come later get
the stored answer. What ends with an error is not stored, and may be sent again.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from starlette.types import Message, Receive, Scope

from cottention.engine.errors import KeyReusedError, SessionError, StoreUnavailableError
from cottention.engine.sessions.store.protocol import Claim
from cottention.server.http.answer_writer import without_answer_writer
from cottention.server.http.errors import ApiError, invalid, unavailable
from cottention.server.idempotency.recording import (
    Answering,
    RecordedResponse,
    Recording,
    answer_of,
    replayed,
)
from cottention.server.observability.access_log import request_record
from cottention.server.sessions.store_threads import in_store_thread

if TYPE_CHECKING:  # it imports torch, which the server must not load
    from cottention.engine.sessions.manager import SessionManager
    from cottention.engine.sessions.types import Session, SessionAnswer

logger = logging.getLogger("cottention")

Relay = Callable[[str, Request, bytes], Awaitable[Response]]
"""Sends a request with this body to the server of a url. ConnectionError: it cannot be reached."""

MAX_LENGTH = 255
KEY = f"1 to {MAX_LENGTH} visible ASCII characters"
WAIT_SECONDS = 0.2
"""Between looks at a request whose server has died."""
MAX_WAITS = 40
MAX_RETAINED = 64
"""Answers in memory that the store did not take."""


@dataclass(eq=False)
class KeyedRequest:
    """A request that is executed for its key.

    is_kept: its answer is stored already. turn: of a session or a response in the background, which
    does not end with its response. is_early: the response does not wait for it. has_failed: the
    request may be sent again, although it was answered.
    """

    claim: Claim
    recording: Recording
    is_kept: bool = False
    turn: asyncio.Task[None] | None = None
    is_early: bool = False
    has_failed: bool = False

    def session_answer(self, make: Callable[[Any], bytes]) -> "SessionAnswer":
        """What a session's change stores in its own transaction, made of the sessions after it."""
        from cottention.engine.sessions.types import SessionAnswer

        return SessionAnswer(self.claim, make)


def keyed_request_of(scope: Scope) -> KeyedRequest | None:
    """The keyed request that is executed; None without a key."""
    found: KeyedRequest | None = scope["state"].get("keyed")
    return found


@dataclass(eq=False)
class ResponseOnce:
    """A response that is stored with the change of sessions that it tells.

    keyed: None without a key; then it is made after the change, as `respond` does.
    """

    keyed: KeyedRequest | None
    make: "Callable[[list[Session]], Response]"
    response: Response | None = field(default=None, init=False)

    @property
    def answer(self) -> "SessionAnswer | None":
        """For SessionManager; None without a key."""
        if self.keyed is None:
            return None

        def make(sessions: "list[Session]") -> bytes:
            self.response = self.make(sessions)
            return answer_of(self.response)

        return self.keyed.session_answer(make)

    def respond(self, sessions: "list[Session]") -> Response:
        """After the change."""
        is_stored = all(each.is_durable for each in sessions)
        if self.keyed is None or self.response is None or not is_stored:
            return self.make(sessions)
        self.keyed.is_kept = True
        return self.response


class IdempotencyKeys:
    """The requests with keys that this server executes."""

    def __init__(
        self,
        sessions: "SessionManager",
        lifetime_seconds: float,
        max_bytes: int,
        keep_alive_seconds: float,
        relay: Relay | None = None,
    ) -> None:
        """max_bytes: of one answer. keep_alive_seconds: between comments of an idle event stream.

        relay: to the server that executes a request.
        """
        self._sessions = sessions
        self._lifetime_seconds = lifetime_seconds
        self.max_bytes = max_bytes
        self._keep_alive_seconds = keep_alive_seconds
        self._relay = relay
        self._recordings: dict[tuple[str, str], Recording] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def respond(
        self, request: Request, raw: bytes, owner: str, answer: Answering
    ) -> Response:
        """The response to a request with a key and this body, which `answer` executes.

        Raises ApiError, SessionError.
        """
        key = key_of(request)
        assert key is not None
        digest = request_digest(request.url.path, request.url.query, raw)
        claim = self._sessions.claim
        for _ in range(MAX_WAITS):
            try:
                found = await in_store_thread(claim, owner, key, digest, self._lifetime_seconds)
            except KeyReusedError as error:
                raise ApiError(
                    422, str(error), param="Idempotency-Key", code="idempotency_key_reused"
                ) from None
            if isinstance(found, Claim):
                return self._execute(request, raw, found, answer)
            if found.answer is not None:
                return replayed(found.answer)
            recording = self._recordings.get((owner, key))
            if recording is not None:
                return RecordedResponse(recording, self._keep_alive_seconds)
            if found.is_alive and found.url and self._relay and not found.is_mine:
                with contextlib.suppress(ConnectionError):  # it has just died, or ends
                    return await self._relay(found.url, request, raw)
            await asyncio.sleep(WAIT_SECONDS)
        raise unavailable("another request of this Idempotency-Key is being executed")

    def follow(self, claim: Claim) -> KeyedRequest:
        """A request that another server has begun, and whose answer this one makes to its end."""
        recording = Recording(self.max_bytes)
        self._recordings[claim.owner, claim.key] = recording
        return KeyedRequest(claim, recording)

    async def finish(self, keyed: KeyedRequest) -> None:
        """Store the answer, or that there is none."""
        claim, recording = keyed.claim, keyed.recording
        if keyed.turn is not None:
            await asyncio.wait([keyed.turn])
        answer = None if keyed.has_failed else recording.answer
        try:
            if not keyed.is_kept:
                await self._store(claim, answer)
        except SessionError as error:
            logger.error("the answer of an idempotency key could not be stored: %s", error)
            has_room = len(self._recordings) - len(self._tasks) < MAX_RETAINED
            if isinstance(error, StoreUnavailableError) and answer and has_room:
                return  # it is repeated from memory until the server ends
        if self._recordings.get((claim.owner, claim.key)) is recording:
            del self._recordings[claim.owner, claim.key]

    async def _store(self, claim: Claim, answer: bytes | None) -> None:
        if answer is None:
            await in_store_thread(self._sessions.drop_claim, claim)
        else:
            await in_store_thread(self._sessions.keep_answer, claim, answer)

    async def wait_settled(self) -> None:
        """Return when every request has ended."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def record(
        self, keyed: KeyedRequest, scope: Scope, response: "Awaitable[Response]"
    ) -> "asyncio.Task[None]":
        """Record a response of `follow`, to its end."""

        async def answer(_: Request) -> Response:
            return await response

        return self._start(Request(dict(scope) | {"headers": []}, body_once(b"")), keyed, answer)

    def _start(
        self, request: Request, keyed: KeyedRequest, answer: Answering
    ) -> "asyncio.Task[None]":
        task = asyncio.create_task(self._run(request, keyed, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _execute(self, request: Request, raw: bytes, claim: Claim, answer: Answering) -> Response:
        keyed = self.follow(claim)
        scope = without_answer_writer(request.scope) | {
            "state": request.scope["state"] | {"keyed": keyed}
        }
        task = self._start(Request(scope, body_once(raw)), keyed, answer)
        request_record(request.scope).background_turn = task
        return RecordedResponse(keyed.recording, self._keep_alive_seconds)

    async def _run(self, request: Request, keyed: KeyedRequest, answer: Answering) -> None:
        recording, error = keyed.recording, None
        try:
            response = await answer(request)
            await response(request.scope, request.receive, recording.send)
        except Exception as raised:
            error = raised
        finally:
            if keyed.is_early:
                recording.end(error)
            # stored before the end is sent: who has it may repeat the request at once
            await self.finish(keyed)
            recording.end(error)


def key_of(request: Request) -> str | None:
    """The request's Idempotency-Key; None without one. Raises ApiError 400."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 1 <= len(key) <= MAX_LENGTH or not all("!" <= each <= "~" for each in key):
        raise invalid("Idempotency-Key", f"Idempotency-Key must be {KEY}")
    return key


def request_digest(path: str, query: str, raw: bytes) -> bytes:
    """What tells a request from others: its path, its query and the bytes of its body."""
    return sha256(b"\0".join([path.encode(), query.encode(), raw])).digest()


def body_once(raw: bytes) -> Receive:
    """The messages of a client that has sent this body and never leaves."""
    messages: list[Message] = [{"type": "http.request", "body": raw, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    return receive
