"""Responses about sessions: their objects, lists, the summary in a turn's response, the ETag."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from cottention.engine.state.context_window import ContextPolicy
from cottention.server.schemas.responses import JsonObject

if TYPE_CHECKING:  # it imports torch, which the server must not load
    from cottention.engine.sessions.types import Session


class SessionObject(BaseModel):
    """A session.

    position: number of tokens that it holds. bytes: its size on disk.
    context_start: index of the oldest token that the model still remembers.
    residence: resident while a turn runs, parked in memory, or stored on disk only.
    checkpoints: number of turns that can be rewound. durable: whether its last turn is on disk.
    interrupted: a crash interrupted a turn, and the session is as it was before that turn.
    """

    id: str
    object: Literal["session"]
    created: int
    position: int
    context_start: int
    context_policy: ContextPolicy
    bytes: int
    residence: Literal["resident", "parked", "stored"]
    version: int
    checkpoints: int
    durable: bool
    interrupted: bool
    metadata: dict[str, str]
    expires_at: float | None


class SessionList(BaseModel):
    """Sessions, newest first; `has_more` if there are others `after` the last one."""

    object: Literal["list"]
    data: list[SessionObject]
    has_more: bool


class SessionTokens(BaseModel):
    """The token ids that a session keeps of its end.

    start: index of the first of them in the session; the last one's is `position` - 1.
    """

    id: str
    object: Literal["session.tokens"]
    position: int
    context_start: int
    start: int
    tokens: list[int]


class DeletedSession(BaseModel):
    """A deleted session."""

    id: str
    object: Literal["session"]
    deleted: Literal[True]


class CancelledTurn(BaseModel):
    """What became of a session's turn that was to be cancelled.

    status: the turn was cancelled, still ends, or had just ended; or none was running.
    """

    id: str
    status: Literal["cancelled", "cancelling", "completed", "idle"]


class Places(BaseModel):
    """A number for each place where a session may be kept."""

    resident: int
    parked: int
    stored: int


class Capacity(BaseModel):
    """The memory that a session takes, the slots of the pool, and where the sessions are.

    bytes_per_session: by item. bytes_per_place: maximum bytes of one session; a running turn takes
    a slot of the pool. sessions_per_gb: minimum number of sessions in 10⁹ bytes of each place.
    softmax_bytes_per_token: what a key-value cache of the same layers and heads would take.
    paused_states: states of streams that wait for their readers, kept on the host.
    """

    object: Literal["capacity"]
    bytes_per_session: dict[str, int]
    bytes_per_place: Places
    sessions_per_gb: Places
    softmax_bytes_per_token: int
    slots: int
    free_slots: int
    paused_states: int
    max_paused_states: int
    resident: int
    parked: int
    stored: int
    parked_bytes: int
    stored_bytes: int


def session_response(session: "Session") -> JSONResponse:
    """One session, with its position as ETag."""
    return JSONResponse(session_object(session), headers={"ETag": etag_of(session)})


def session_tokens_response(session: "Session", ids: Sequence[int]) -> JSONResponse:
    """The last ids of a session, with its position as ETag."""
    fields = {
        "id": session.id,
        "object": "session.tokens",
        "position": session.position,
        "context_start": session.context_start,
        "start": session.position - len(ids),
        "tokens": list(ids),
    }
    return JSONResponse(fields, headers={"ETag": etag_of(session)})


def session_list_response(sessions: Sequence["Session"], has_more: bool) -> JSONResponse:
    """A list of sessions."""
    data = [session_object(session) for session in sessions]
    return JSONResponse({"object": "list", "data": data, "has_more": has_more})


def etag_of(session: "Session") -> str:
    """The value for If-Match."""
    return f'"{session.position}"'


def session_object(session: "Session") -> JsonObject:
    """The fields of SessionObject."""
    return {
        "id": session.id,
        "object": "session",
        "created": session.created,
        "position": session.position,
        "context_start": session.context_start,
        "context_policy": session.context_policy,
        "bytes": session.nbytes,
        "residence": session.residence,
        "version": session.version,
        "checkpoints": session.num_checkpoints,
        "durable": session.is_durable,
        "interrupted": session.was_interrupted,
        "metadata": dict(session.metadata),
        "expires_at": session.expires_at,
    }


def session_summary(session: "Session") -> JsonObject:
    """The fields of SessionSummary."""
    return {
        "id": session.id,
        "position": session.position,
        "context_start": session.context_start,
        "durable": session.is_durable,
    }
