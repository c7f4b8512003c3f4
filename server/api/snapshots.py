"""/v1/sessions/ID/snapshot and /v1/sessions/import: sessions exported and imported as bytes."""

import asyncio
import json
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response

from cottention.engine.errors import SnapshotError, SnapshotMismatchError
from cottention.server.api.dependencies import ContextDep
from cottention.server.api.openapi import Schema, refusals
from cottention.server.api.query_params import must_be, query_of
from cottention.server.http.body import read_body
from cottention.server.http.errors import ApiError, invalid
from cottention.server.schemas.session_responses import SessionObject, etag_of, session_response
from cottention.server.schemas.sessions import METADATA, TTL, KeptBody, kept_body
from cottention.server.sessions.turn_queue import caller_of

router = APIRouter()

OCTETS = "application/octet-stream"
BINARY: Schema = {OCTETS: {"schema": {"type": "string", "format": "binary"}}}


@router.get(
    "/v1/sessions/{session_id}/snapshot",
    response_class=Response,
    responses=refusals(400, 401, 404, 500) | {200: {"content": BINARY}},
)
async def get_snapshot(session_id: str, request: Request, context: ContextDep) -> Response:
    """A session's state, as bytes that /v1/sessions/import takes."""
    owner, sessions = caller_of(request).owner, context.sessions
    session, raw = await asyncio.to_thread(sessions.export, owner, session_id)
    return Response(raw, media_type=OCTETS, headers={"ETag": etag_of(session)})


@router.post(
    "/v1/sessions/import",
    response_model=SessionObject,
    responses=refusals(400, 401, 409, 413, 415, 500, 503, 507),
    dependencies=[query_of("metadata", "ttl_seconds")],
    openapi_extra={"requestBody": {"required": True, "content": BINARY}},
)
async def import_session(
    request: Request,
    context: ContextDep,
    metadata: str | None = None,
    ttl_seconds: Annotated[float | None, must_be("ttl_seconds", TTL)] = None,
) -> Response:
    """A new session from the bytes of a snapshot; `metadata` is a JSON object.

    Raises ParameterError where no turn of it could run here.
    """
    context.bridge.check_accepting()
    config = context.config
    owner, kept = caller_of(request).owner, _kept(metadata, ttl_seconds)
    raw = await read_body(request, config.max_snapshot_bytes, config.receive_seconds)
    import_, check = context.sessions.import_, context.bridge.engine.policies.check_goes_on
    how = kept.metadata, kept.ttl_seconds, check
    try:
        return session_response(await asyncio.to_thread(import_, owner, raw, *how))
    except SnapshotMismatchError as error:
        raise ApiError(409, str(error), code="snapshot_mismatch") from None
    except SnapshotError as error:
        raise ApiError(400, str(error), code="bad_snapshot") from None


def _kept(metadata: str | None, ttl_seconds: float | None) -> KeptBody:
    given: dict[str, Any] = {"ttl_seconds": ttl_seconds}
    if metadata is not None:
        try:
            given["metadata"] = json.loads(metadata)
        except (ValueError, RecursionError):
            raise invalid("metadata", f"metadata must be {METADATA}, as JSON") from None
    return kept_body(given)
