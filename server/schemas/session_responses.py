"""How sessions are sent: their objects, lists, and the header with their position.

Owns names and shapes, for answers and for the published description. Knows no endpoint.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from cottention.engine.state.context_window import ContextPolicy
from cottention.server.schemas.responses import JsonObject

if TYPE_CHECKING:  # it brings torch with it, which the server does not know
    from cottention.engine.sessions.types import Session


class SessionObject(BaseModel):
    """A session: `position` counts the tokens it holds, `bytes` is what it takes on the disk.

    context_start: index of the oldest of them that is remembered.

    residence: resident while a turn runs, parked in memory, or stored on the disk alone.
    checkpoints: how many turns it can be rewound. durable: whether its last turn is on the disk.
    interrupted: a crash has cut a turn, and the session is as it was before that.
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
    """Some sessions, the newest first; `has_more` where `after` the last one there are others."""

    object: Literal["list"]
    data: list[SessionObject]
    has_more: bool


class DeletedSession(BaseModel):
    """A session that is no more."""

    id: str
    object: Literal["session"]
    deleted: Literal[True]


class Places(BaseModel):
    """A figure for each place where a session may live."""

    resident: int
    parked: int
    stored: int


class Capacity(BaseModel):
    """What a session costs, what there is, and where the sessions are.

    bytes_per_session: by what they hold. bytes_per_place: of one session, at most; what runs takes
    a slot of the pool. sessions_per_gb: how many fit into 10⁹ bytes of each place, at least.
    paused_states: on the host, of streams that wait for their readers.
    """

    object: Literal["capacity"]
    bytes_per_session: dict[str, int]
    bytes_per_place: Places
    sessions_per_gb: Places
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
    """One session, and its position as its ETag."""
    return JSONResponse(shape_of(session), headers={"ETag": etag_of(session)})


def session_list_response(sessions: Sequence["Session"], has_more: bool) -> JSONResponse:
    """Several sessions."""
    data = [shape_of(session) for session in sessions]
    return JSONResponse({"object": "list", "data": data, "has_more": has_more})


def etag_of(session: "Session") -> str:
    """What If-Match may name."""
    return f'"{session.position}"'


def shape_of(session: "Session") -> JsonObject:
    """A session's object."""
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


def shape_in_answer(session: "Session") -> JsonObject:
    """What a turn's answer tells of its session."""
    return {
        "id": session.id,
        "position": session.position,
        "context_start": session.context_start,
        "durable": session.is_durable,
    }
