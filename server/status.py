"""What the server says of itself: its model, whether it lives and takes work, its figures."""

from typing import Any

from fastapi import APIRouter, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from server.bridge import Phase
from server.completions import unknown_model
from server.context import Context, ContextDep
from server.errors import unavailable

router = APIRouter()


@router.get("/v1/models")
async def list_models(context: ContextDep) -> dict[str, Any]:
    """The one model, as a list."""
    return {"object": "list", "data": [_model(context)]}


@router.get("/v1/models/{model_id:path}")
async def get_model(model_id: str, context: ContextDep) -> dict[str, Any]:
    """The one model, by its id."""
    if model_id != context.model_name:
        raise unknown_model(model_id, context.model_name)
    return _model(context)


@router.get("/health")
async def health(context: ContextDep) -> dict[str, str]:
    """200 while the engine's thread lives, draining or not."""
    if context.bridge.phase is Phase.FAILED or not context.bridge.is_alive:
        raise unavailable(Phase.FAILED)
    return {"status": "alive"}


@router.get("/ready")
async def ready(context: ContextDep) -> dict[str, str]:
    """200 while new work is taken."""
    context.bridge.check_accepting()
    return {"status": "ready"}


@router.get("/metrics", response_class=Response)
async def metrics(context: ContextDep) -> Response:
    """Figures in Prometheus' text format."""
    return Response(generate_latest(context.registry), media_type=CONTENT_TYPE_LATEST)


def _model(context: Context) -> dict[str, Any]:
    return {
        "id": context.model_name,
        "object": "model",
        "created": context.bridge.created,
        "owned_by": "cottention",
    }
