"""Responses that are kept: each is a session's value, with the response's object as its events.

Such sessions are an owner's own, apart from those of /v1/sessions: nothing changes them, so that
every one can be continued any number of times.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from secrets import token_hex
from typing import TYPE_CHECKING, Self

from cottention.engine.errors import (
    SessionNotFoundError,
    SessionQuotaError,
    SnapshotError,
    SnapshotMismatchError,
)
from cottention.engine.sessions.store.protocol import Quota, Quotas
from cottention.engine.state.event_log import EventLog
from cottention.server.http.body import shown
from cottention.server.http.errors import ApiError, stored_damaged, stored_mismatch, too_many
from cottention.server.responses.writer import Cut
from cottention.server.schemas.responses import JsonObject

if TYPE_CHECKING:  # these import torch, which the server must not load
    from cottention.engine.sessions.manager import SessionManager
    from cottention.engine.sessions.types import Session, SessionAnswer, Turn
    from cottention.engine.state.session_state import SessionState

SUFFIX = "/responses"
"""After the owner of sessions that are responses."""

RESPONSE_ID = re.compile(r"resp_([0-9a-f]{32})")

RETRY_SECONDS = 60

RUNNING = ("queued", "in_progress")
"""Statuses of a response that has not ended."""

INTERRUPTED = "the server stopped before this response had ended: send its request again"


def new_response_id() -> str:
    """The id of a response. Its digits are those of its session's."""
    return f"resp_{token_hex(16)}"


def response_owner(owner: str) -> str:
    """The owner of the sessions that are this owner's responses."""
    return owner + SUFFIX


def quotas_with_responses(quotas: Quotas, max_responses: int | None) -> Quotas:
    """The quotas of owners of sessions and of responses: these have their own number."""

    def quota(owner: str) -> Quota:
        if not owner.endswith(SUFFIX):
            return quotas(owner)
        return Quota(max_responses, quotas(owner.removesuffix(SUFFIX)).max_bytes)

    return quota


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response that has ended, or, in the background, has begun.

    response: its object. input: the items that it answers. cuts: of its deltas. can_continue:
    whether the session's state is the one after the answer.
    """

    response: JsonObject
    input: list[JsonObject]
    cuts: list[Cut]
    can_continue: bool

    def to_log(self) -> EventLog:
        """As it is stored with its session."""
        fields = {
            "response": self.response,
            "input": self.input,
            "cuts": self.cuts,
            "can_continue": self.can_continue,
        }
        return EventLog(token_hex(8), 0, (json.dumps(fields).encode(),))

    @property
    def is_running(self) -> bool:
        """Whether it had not ended when it was stored."""
        return self.response["status"] in RUNNING

    def interrupted(self) -> Self:
        """The same, whose server has died under it."""
        error = {"code": "server_error", "message": INTERRUPTED}
        return replace(self, response=self.response | {"status": "failed", "error": error})

    @classmethod
    def from_log(cls, log: EventLog) -> Self:
        """The inverse of `to_log`. SnapshotError."""
        try:
            [raw] = log.events
            return cls(**json.loads(raw))
        except (ValueError, TypeError) as error:
            raise SnapshotError("the stored response cannot be read") from error


class ResponseStore:
    """The responses of a store of sessions. Calls wait for the disk."""

    def __init__(self, sessions: "SessionManager", ttl_seconds: float | None) -> None:
        self._sessions = sessions
        self._ttl_seconds = ttl_seconds

    def save(
        self,
        owner: str,
        stored: StoredResponse,
        state: "SessionState",
        answer: "SessionAnswer | None" = None,
    ) -> bool:
        """Keep a response that has ended. ApiError 429 where the owner has as many as it may.

        answer: of its idempotency key, kept with it. Returns whether both survive a restart.
        """
        return self._open(owner, stored, state, answer).is_durable

    def begin(self, owner: str, stored: StoredResponse, start: "SessionState") -> "Turn":
        """Keep a response that has begun, so that it is found after a crash. ApiError 429.

        It is a turn of its session, which `end`, `abandon` or `leave` ends. start: the state that
        it goes on from.
        """
        key = response_owner(owner), self._open(owner, stored, start).id
        try:
            return self._sessions.begin(*key)
        except BaseException:
            self._sessions.delete(*key)
            raise

    def end(
        self,
        turn: "Turn",
        stored: StoredResponse,
        state: "SessionState",
        answer: "SessionAnswer | None" = None,
    ) -> bool:
        """Keep what became of a response that was begun. Raises SessionError.

        answer, and what is returned, as in `save`.
        """
        log = stored.to_log()
        return self._sessions.commit(turn, state, log, answer=answer, max_checkpoints=0).is_durable

    def leave(self, turn: "Turn", *, hands_over: bool) -> None:
        """Leave a response that was begun to another server. Raises StoreUnavailableError."""
        self._sessions.leave(turn, hands_over=hands_over)

    def abandon(self, turn: "Turn") -> None:
        """Forget a response that was begun. Raises SessionError."""
        self._sessions.abandon(turn)
        self._sessions.delete(turn.session.owner, turn.session.id)

    def _open(
        self,
        owner: str,
        stored: StoredResponse,
        state: "SessionState",
        answer: "SessionAnswer | None" = None,
    ) -> "Session":
        """A new session that has the response."""
        try:
            return self._sessions.open(
                response_owner(owner),
                state,
                {},
                self._ttl_seconds,
                session_id=session_id_of(stored.response["id"]),
                events=stored.to_log(),
                answer=answer,
            )
        except SessionQuotaError as error:
            message = (
                f"the response cannot be stored: {error} (--max-responses-per-key,"
                " --response-ttl-seconds; responses count as sessions here)"
            )
            raise too_many(message, RETRY_SECONDS, "too_many_responses") from None

    def load(self, owner: str, response_id: str, param: str = "response_id") -> StoredResponse:
        """A response. ApiError 404 for an unknown one and another owner's."""
        return self._load(owner, response_id, param, self._sessions.events)

    def load_state(
        self, owner: str, response_id: str, param: str
    ) -> "tuple[StoredResponse, SessionState]":
        """A response, and the state after its answer. ApiError 404 as in `load`."""
        states: list[SessionState] = []

        def log_of(owner: str, session_id: str) -> EventLog:
            value = self._sessions.value(owner, session_id)
            states.append(value.state)
            return value.events

        return self._load(owner, response_id, param, log_of), states[0]

    def _load(
        self, owner: str, response_id: str, param: str, log_of: Callable[[str, str], EventLog]
    ) -> StoredResponse:
        key = response_owner(owner), session_id_of(response_id, param)
        try:
            # asked before: a response that ends meanwhile was not interrupted
            was_interrupted = self._sessions.find(*key).was_interrupted
            stored = StoredResponse.from_log(log_of(*key))
        except SessionNotFoundError:
            raise not_found(response_id, param) from None
        except SnapshotError as error:
            raise _unreadable(error, response_id, param) from None
        return stored.interrupted() if stored.is_running and was_interrupted else stored

    def delete(self, owner: str, response_id: str) -> None:
        """Forget a response. ApiError 404 as in `load`."""
        session_id = session_id_of(response_id)
        try:
            self._sessions.delete(response_owner(owner), session_id)
        except SessionNotFoundError:
            raise not_found(response_id) from None


def not_found(response_id: str, param: str = "response_id") -> ApiError:
    """A 404, the same for a response that is unknown and for one of another owner."""
    message = f"there is no stored response {shown(response_id)}"
    return ApiError(404, message, param=param, code="response_not_found")


def _unreadable(error: SnapshotError, response_id: str, param: str) -> ApiError:
    """Where a stored response cannot be used: it is of another model, or damaged."""
    name = f"response {shown(response_id)}"
    if isinstance(error, SnapshotMismatchError):
        return stored_mismatch(error, name, param)
    advice = f"DELETE /v1/responses/{response_id} removes it; send its conversation again"
    return stored_damaged(error, name, advice)


def response_id_of(session_id: str) -> str:
    """The id of the response that a session is."""
    return f"resp_{session_id.removeprefix('sess-')}"


def session_id_of(response_id: str, param: str = "response_id") -> str:
    """The id of the session that is a response. ApiError 404 for what is no id of one."""
    found = RESPONSE_ID.fullmatch(response_id)
    if found is None:
        raise not_found(response_id, param)
    return f"sess-{found[1]}"
