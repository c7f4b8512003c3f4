"""POST /v1/requests/ID/cancel: end a request by the id of its answer, or the client's own."""

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from cottention.server.api.dependencies import ContextDep, elsewhere
from cottention.server.api.generate import read_empty
from cottention.server.api.openapi import EMPTY_BODY, error_responses
from cottention.server.generation.cancellation import CancelStatus
from cottention.server.http.body import shown
from cottention.server.http.errors import ApiError
from cottention.server.replicas.replicas import session_of
from cottention.server.schemas.responses import JsonObject
from cottention.server.sessions.turn_queue import owner_of

router = APIRouter()


class CancelledRequest(BaseModel):
    """What became of a request: it was cancelled, it still ends, or it had ended before."""

    id: str
    status: CancelStatus


@router.post(
    "/v1/requests/{request_id}/cancel",
    response_model=CancelledRequest,
    responses=error_responses(400, 401, 404, 413, 415, 500, 503),
    openapi_extra={"requestBody": EMPTY_BODY},
)
async def cancel_request(
    request_id: str, request: Request, context: ContextDep
) -> JsonObject | Response:
    """End a request of the caller; its own response then ends with what there is."""
    await read_empty(request, context)
    owner = owner_of(request)
    status = await context.running.cancel(owner, request_id)
    if status is None and context.replicas is not None:
        session_id = session_of(request_id)
        if session_id is None:
            found = await context.replicas.anywhere(request, b"")
        else:
            found = await elsewhere(
                request,
                context,
                session_id,
                lambda: context.turns.is_active(owner, session_id),
            )
        if found is not None:
            return found
        status = await context.running.cancel(owner, request_id)
    if status is None:
        message = f"there is no request {shown(request_id)}, running or among the last ones"
        raise ApiError(404, message, param="request_id", code="request_not_found")
    return {"id": request_id, "status": status}
