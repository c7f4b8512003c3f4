"""/health, /ready, /metrics, /version, /v1/models and /v1/capacity."""

from typing import Annotated

from fastapi import APIRouter, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from cottention.server.api.dependencies import Context, ContextDep, check_capability
from cottention.server.api.generate import unknown_model
from cottention.server.api.openapi import error_responses
from cottention.server.api.query_params import must_be
from cottention.server.generation.async_engine import Phase
from cottention.server.generation.chat_template import ChatTemplate
from cottention.server.http.errors import unavailable
from cottention.server.http.routing import plain_path
from cottention.server.schemas.responses import JsonObject, Model, ModelList, Status, Version
from cottention.server.schemas.session_responses import Capacity
from cottention.server.sessions.store_threads import in_store_thread
from cottention.server.version import package_version

router = APIRouter()


@router.get("/v1/models", response_model=ModelList, responses=error_responses(401))
async def list_models(context: ContextDep) -> JsonObject:
    """The served model, as a list."""
    return {"object": "list", "data": [_model(context)]}


@router.get("/v1/models/{model_id:path}", response_model=Model, responses=error_responses(401, 404))
async def get_model(model_id: str, context: ContextDep) -> JsonObject:
    """The served model, by its id."""
    name = context.model_name  # a name may begin with a slash, which a path does not keep
    if plain_path(f"/{model_id}") != plain_path(f"/{name}"):
        raise unknown_model(model_id, name)
    return _model(context)


@router.get("/version", response_model=Version, responses=error_responses(401))
async def version() -> JsonObject:
    """The version of the server."""
    return {"version": package_version()}


@router.get("/health", response_model=Status, responses=error_responses(503))
async def health(context: ContextDep) -> JsonObject:
    """200 while the engine's thread is alive, also while the server is shutting down."""
    if context.engine.phase is Phase.FAILED or not context.engine.is_alive:
        raise unavailable(Phase.FAILED)
    return {"status": "alive"}


@router.get("/ready", response_model=Status, responses=error_responses(400, 503))
async def ready(
    context: ContextDep,
    sessions: Annotated[bool, must_be("sessions", "true or false, or 1 or 0")] = False,
) -> JsonObject:
    """200 while new requests are accepted; with `sessions`, while those with a session are, too.

    A model without sessions has nothing more to wait for.
    """
    context.engine.check_accepting()
    if sessions and context.session_manager is not None:
        context.session_manager.check_reachable()
    return {"status": "ready"}


@router.get(
    "/metrics",
    response_class=Response,
    responses=error_responses(401)
    | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(context: ContextDep) -> Response:
    """Metrics in Prometheus' text format."""
    text = await in_store_thread(generate_latest, context.registry)  # queries the store
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def _model(context: Context) -> JsonObject:
    """As in vLLM: `root` is the model's own name, whatever it is served as; without adapters no
    model has a parent.
    """
    return {
        "id": context.model_name,
        "object": "model",
        "created": context.engine.created,
        "owned_by": "cottention",
        "root": context.engine.engine.name,
        "parent": None,
        "max_model_len": context.trained_length,
        "capabilities": list(context.capabilities),
        "chat_template": isinstance(context.template, ChatTemplate),
    }


@router.get("/v1/capacity", response_model=Capacity, responses=error_responses(400, 401))
async def capacity(context: ContextDep) -> JsonObject:
    """The memory that a session takes, and what pool, memory and disk hold."""
    check_capability("sessions", context)
    stats, cost = context.engine.stats(), context.session_bytes
    sizes = await in_store_thread(context.sessions.sizes)
    return {
        "object": "capacity",
        "bytes_per_session": cost.items,
        "bytes_per_place": cost.places,
        "sessions_per_gb": cost.per_gb(),
        "softmax_bytes_per_token": context.softmax_bytes_per_token,
        "slots": stats.num_slots,
        "free_slots": stats.num_free_slots,
        "paused_states": stats.num_paused_states,
        "max_paused_states": stats.max_paused_states,
        "resident": sizes.num_resident,
        "parked": sizes.num_parked,
        "stored": sizes.num_stored,
        "parked_bytes": sizes.parked_bytes,
        "stored_bytes": sizes.stored_bytes,
    }
