"""What the server says of itself: its model, whether it lives and takes work, its figures."""

import asyncio

from cottention.server.answering import check_model
from cottention.server.answers import Model, ModelList, Shape, Status, Version
from cottention.server.bridge import Phase
from cottention.server.context import Context, ContextDep
from cottention.server.errors import unavailable
from cottention.server.openapi import refusals
from cottention.server.version import package_version
from fastapi import APIRouter, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

router = APIRouter()


@router.get("/v1/models", response_model=ModelList, responses=refusals(401))
async def list_models(context: ContextDep) -> Shape:
    """The one model, as a list."""
    return {"object": "list", "data": [_model(context)]}


@router.get("/v1/models/{model_id:path}", response_model=Model, responses=refusals(401, 404))
async def get_model(model_id: str, context: ContextDep) -> Shape:
    """The one model, by its id."""
    check_model(model_id, context)
    return _model(context)


@router.get("/version", response_model=Version, responses=refusals(401))
async def version() -> Shape:
    """The distribution's version."""
    return {"version": package_version()}


@router.get("/health", response_model=Status, responses=refusals(503))
async def health(context: ContextDep) -> Shape:
    """200 while the engine's thread lives, draining or not."""
    if context.bridge.phase is Phase.FAILED or not context.bridge.is_alive:
        raise unavailable(Phase.FAILED)
    return {"status": "alive"}


@router.get("/ready", response_model=Status, responses=refusals(503))
async def ready(context: ContextDep) -> Shape:
    """200 while new work is taken."""
    context.bridge.check_accepting()
    return {"status": "ready"}


@router.get(
    "/metrics",
    response_class=Response,
    responses=refusals(401) | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(context: ContextDep) -> Response:
    """Figures in Prometheus' text format."""
    text = await asyncio.to_thread(generate_latest, context.registry)  # it asks the store
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def _model(context: Context) -> Shape:
    return {
        "id": context.model_name,
        "object": "model",
        "created": context.bridge.created,
        "owned_by": "cottention",
        "max_model_len": context.trained_length,
    }
