"""The FastAPI application: endpoints, middleware, and the start and end of the engine's thread."""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, cast

from fastapi import APIRouter, FastAPI
from starlette.routing import BaseRoute

from cottention.engine.encoding import Capability
from cottention.server.api import (
    chat,
    completions,
    messages,
    page,
    requests,
    status,
    swagger,
    tokenize,
)
from cottention.server.api.adoption import go_on
from cottention.server.api.dependencies import Context, requires, session_bytes
from cottention.server.api.encoders import embeddings, fill_mask
from cottention.server.api.exception_handlers import add_exception_handlers
from cottention.server.api.openapi import install_openapi
from cottention.server.api.responses import creation, stored
from cottention.server.api.sessions import events, lifecycle, snapshots
from cottention.server.config import ServerConfig
from cottention.server.generation.async_engine import AsyncEngine, Phase
from cottention.server.generation.cancellation import RunningRequests
from cottention.server.generation.chat_template import ChatTemplate, UnusableTemplate
from cottention.server.http.body_memory import BodyMemory
from cottention.server.http.origin import (
    HostMiddleware,
    OriginMiddleware,
    allowed_hosts,
    allowed_origins,
)
from cottention.server.http.pacing import PacingMiddleware
from cottention.server.http.request_id import RequestIdMiddleware
from cottention.server.http.routing import RoutingMiddleware
from cottention.server.idempotency.keys import IdempotencyKeys
from cottention.server.limits.api_keys import (
    NAME_LENGTH,
    ApiKey,
    ApiKeyMiddleware,
    checks_host,
    owner_id,
    requires_key,
)
from cottention.server.limits.key_limits import KeyLimits
from cottention.server.limits.rate_limit import KeyUsage, RateLimitMiddleware
from cottention.server.limits.shared_limits import SharedKeyUsage, SharedLimits
from cottention.server.observability.access_log import AccessLog, AccessLogMiddleware
from cottention.server.observability.metrics import make_registry
from cottention.server.observability.tracing import Tracing, TracingMiddleware
from cottention.server.replicas.replicas import Replicas
from cottention.server.schemas.chat import ChatRequest
from cottention.server.schemas.completions import CompletionRequest
from cottention.server.schemas.encoding import EmbeddingRequest, FillMaskRequest
from cottention.server.schemas.messages import CountTokensRequest, MessagesRequest
from cottention.server.schemas.responses_api import ResponseRequest
from cottention.server.schemas.sessions import AppendRequest, ForkRequest, SessionRequest
from cottention.server.sessions.journal import JournalWriter
from cottention.server.sessions.reads import ReadLimit
from cottention.server.sessions.turn_queue import TurnQueue
from cottention.server.version import package_version

if TYPE_CHECKING:  # it imports torch, which the server must not load
    from cottention.engine.engine import Engine
    from cottention.engine.sessions.manager import SessionManager

ROUTERS: tuple[tuple[APIRouter, Capability | None], ...] = (
    (completions.router, "completions"),
    (chat.router, "chat"),
    (creation.router, "sessions"),
    (stored.router, "sessions"),
    (messages.router, "chat"),
    (snapshots.router, "sessions"),
    (events.router, "sessions"),
    (lifecycle.router, "sessions"),
    (embeddings.router, "embeddings"),
    (fill_mask.router, "fill-mask"),
    (tokenize.router, None),
    (requests.router, None),
    (status.router, None),
)
"""Each with the capability of a model that its endpoints need."""

BODIES = (
    CompletionRequest,
    ChatRequest,
    tokenize.TokenizeRequest,
    tokenize.TokenizeChatRequest,
    tokenize.DetokenizeRequest,
    SessionRequest,
    AppendRequest,
    ForkRequest,
    EmbeddingRequest,
    FillMaskRequest,
    ResponseRequest,
    MessagesRequest,
    CountTokensRequest,
)


def create_app(
    engine: AsyncEngine,
    config: ServerConfig,
    keys: Sequence[ApiKey],
    sessions: "SessionManager | None",
    template: ChatTemplate | UnusableTemplate | None = None,
) -> FastAPI:
    """An application that serves an engine, which it starts and stops.

    keys: accepted API keys; without any no key is required.
    sessions: the session manager, which the caller closes after the application's shutdown; None
    for an encoder.
    """
    turns = None if sessions is None else TurnQueue(sessions, engine.check_accepting)
    ledger = None if sessions is None else sessions.key_ledger
    shared = None if ledger is None else SharedLimits(ledger)
    usage = _usage_by_owner(keys, config, shared)
    beside = nullcontext() if shared is None else shared.exchanging(usage)
    replicas = None if sessions is None else _replicas(engine, sessions, lambda: app)
    idempotency_keys = None if sessions is None else _idempotency_keys(sessions, config, replicas)
    name = config.served_model_name or engine.engine.name
    tracing = None if config.otlp_endpoint is None else Tracing(config.otlp_endpoint, name)
    app = _new_app(engine, turns, idempotency_keys, replicas, beside, tracing)
    if sessions is None:
        registry = make_registry(engine, None, None, name)
        max_snapshot_bytes = 0
    else:
        cost = session_bytes(cast("Engine", engine.engine), config)
        registry = make_registry(engine, sessions.sizes, cost, name, ledger)
        max_snapshot_bytes = min(config.max_snapshot_bytes, sessions.max_snapshot_nbytes)
    access_log = AccessLog(
        config.log_prompt_characters,
        engine.engine.tokenizer.written_bytes,
        {owner: each.name for owner, each in usage.items()},
    )
    app.state.context = Context(
        engine,
        config,
        registry,
        sessions,
        turns,
        idempotency_keys,
        replicas,
        ReadLimit(config.max_session_reads),
        BodyMemory(config.max_received_bytes, max_snapshot_bytes, config.max_response_items),
        RunningRequests(engine.cancel),
        access_log,
        template,
    )
    app.router.routes.extend(_routes())
    if config.ui:
        app.router.routes.extend(page.make_router().routes)
        app.router.routes.extend(swagger.make_router().routes)
    install_openapi(app, BODIES, lambda path: requires_key(path, config))
    add_exception_handlers(app)
    _add_middleware(app, usage, config, tracing, access_log)
    return app


def _replicas(
    engine: AsyncEngine, sessions: "SessionManager", app: Callable[[], FastAPI]
) -> Replicas | None:
    """None where no other server has the sessions, nor this one's next start."""
    if sessions.journal is None:
        return None
    has_one_arithmetic = cast("Engine", engine.engine).has_one_arithmetic
    return Replicas(
        sessions,
        JournalWriter(sessions.journal, gates=not has_one_arithmetic),
        lambda adopted: go_on(app().state.context, adopted),
        lambda: engine.phase is Phase.READY,
    )


def _idempotency_keys(
    sessions: "SessionManager", config: ServerConfig, replicas: Replicas | None
) -> IdempotencyKeys:
    relay = None if replicas is None else replicas.relay
    return IdempotencyKeys(
        sessions,
        config.idempotency_seconds,
        config.idempotency_bytes,
        config.sse_keep_alive_seconds,
        relay,
    )


@functools.cache
def _routes() -> list[BaseRoute]:
    """The routes of all endpoints, shared by a process's applications.

    FastAPI derives the models of parameters and responses again for each inclusion of a router.
    """
    whole = APIRouter()
    for router, capability in ROUTERS:
        needed = [] if capability is None else [requires(capability)]
        whole.include_router(router, dependencies=needed)
    return whole.routes


def _new_app(
    engine: AsyncEngine,
    turns: TurnQueue | None,
    keys: IdempotencyKeys | None,
    replicas: Replicas | None,
    beside: AbstractAsyncContextManager[None],
    tracing: Tracing | None,
) -> FastAPI:
    """An application without endpoints; its shutdown waits until every turn has been stored.

    beside: entered while it runs.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        if replicas is not None:
            replicas.start()
        async with beside:
            yield
        if replicas is not None:
            await replicas.stop()
        await asyncio.to_thread(engine.stop)
        if turns is not None:
            await turns.wait_settled()
        if keys is not None:
            await keys.wait_settled()
        if tracing is not None:
            await tracing.close()

    # FastAPI's own pages load scripts from elsewhere.
    return FastAPI(
        title="cottention-server",
        version=package_version(),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )


def _usage_by_owner(
    keys: Sequence[ApiKey], config: ServerConfig, shared: SharedLimits | None
) -> dict[str, KeyUsage]:
    """Usage by owner; without keys there is one for all clients.

    shared: of other servers with the same keys.
    """

    def usage_of(owner: str, name: str, limits: KeyLimits, weight: int = 1) -> KeyUsage:
        if shared is None:
            return KeyUsage(name, limits, weight=weight)
        return SharedKeyUsage(owner, name, limits, shared, weight=weight)

    if not keys:
        return {"": usage_of("", "", KeyLimits.from_config(config))}
    owners = [(owner_id(key.secret), key) for key in keys]
    return {
        owner: usage_of(owner, key.name or owner[:NAME_LENGTH], key.limits, key.weight)
        for owner, key in owners
    }


def _add_middleware(
    app: FastAPI,
    usage: Mapping[str, KeyUsage],
    config: ServerConfig,
    tracing: Tracing | None,
    access_log: AccessLog,
) -> None:
    """From the innermost to the outermost: a 401 has CORS headers and a request id as well."""
    has_keys = "" not in usage
    app.add_middleware(RateLimitMiddleware, usage_by_owner=usage)
    app.add_middleware(
        ApiKeyMiddleware, owners=list(usage) if has_keys else [], metrics_key=config.metrics_key
    )
    app.add_middleware(
        HostMiddleware,
        hosts=allowed_hosts(config),
        is_checked=lambda path: checks_host(path, config),
    )
    app.add_middleware(OriginMiddleware, origins=allowed_origins(config))
    app.add_middleware(AccessLogMiddleware, log=access_log)
    app.add_middleware(messages.MessagesErrorMiddleware)
    if tracing is not None:
        app.add_middleware(TracingMiddleware, tracing=tracing)
    app.add_middleware(RequestIdMiddleware)
    app.add_middleware(RoutingMiddleware)
    app.add_middleware(PacingMiddleware)
