"""GET /v1/sessions/ID/snapshot and POST /v1/sessions/import."""

import contextlib
import json
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response

from cottention.engine.errors import SnapshotError
from cottention.server.api.dependencies import ContextDep, reading
from cottention.server.api.openapi import Schema, error_responses
from cottention.server.api.query_params import must_be, only_query_params
from cottention.server.http.body import read_body, shown
from cottention.server.http.errors import bad_snapshot, invalid
from cottention.server.schemas.session_responses import SessionObject, etag_of, session_response
from cottention.server.schemas.sessions import METADATA, TTL, SessionOptions, session_options
from cottention.server.sessions.reads import SnapshotResponse
from cottention.server.sessions.store_threads import in_store_thread
from cottention.server.sessions.turn_queue import caller_of

router = APIRouter()

OCTETS = "application/octet-stream"
BINARY: Schema = {OCTETS: {"schema": {"type": "string", "format": "binary"}}}


@router.get(
    "/v1/sessions/{session_id}/snapshot",
    response_class=Response,
    responses=error_responses(400, 401, 404, 429, 500, 507) | {200: {"content": BINARY}},
)
async def get_snapshot(session_id: str, request: Request, context: ContextDep) -> Response:
    """A session as one file, as it is between turns."""
    owner, sessions = caller_of(request).owner, context.sessions
    with contextlib.ExitStack() as stack:
        stack.enter_context(reading(request, context))
        session, snapshot = await in_store_thread(sessions.open_export, owner, session_id)
        headers = {"ETag": etag_of(session)}
        return SnapshotResponse(snapshot, headers, stack.pop_all().close)


@router.post(
    "/v1/sessions/import",
    response_model=SessionObject,
    responses=error_responses(400, 401, 403, 409, 413, 415, 429, 500, 503, 507),
    dependencies=[only_query_params("metadata", "ttl_seconds")],
    openapi_extra={"requestBody": {"required": True, "content": BINARY}},
)
async def import_session(
    request: Request,
    context: ContextDep,
    metadata: str | None = None,
    ttl_seconds: Annotated[float | None, must_be("ttl_seconds", TTL)] = None,
) -> Response:
    """Create a session from a snapshot; `metadata` is a JSON object.

    Raises ParameterError if no turn of the session could run on this server.
    """
    context.engine.check_accepting()
    owner, options = caller_of(request).owner, _options(metadata, ttl_seconds)
    held = context.bodies.snapshot(request)
    raw = await read_body(request, context.max_snapshot_bytes, context.pace, held)
    check = context.policies.check_goes_on
    try:
        session = await in_store_thread(
            context.sessions.import_, owner, raw, options.metadata, options.ttl_seconds, check
        )
        return session_response(session)
    except SnapshotError as error:
        raise bad_snapshot(error) from None


def _options(metadata: str | None, ttl_seconds: float | None) -> SessionOptions:
    given: dict[str, Any] = {"ttl_seconds": ttl_seconds}
    if metadata is not None:
        try:
            given["metadata"] = json.loads(metadata)
        except (ValueError, RecursionError):
            message = f"metadata must be {METADATA}, as JSON; it is {shown(metadata)}"
            raise invalid("metadata", message) from None
    return session_options(given)
