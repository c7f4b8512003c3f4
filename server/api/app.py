"""The FastAPI application.

Owns which endpoints there are, what stands before them, and the start and end of the engine's
thread. Knows no signals.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from cottention.server.api import (
    chat,
    completions,
    session_events,
    sessions,
    snapshots,
    status,
    tokenize,
)
from cottention.server.api.dependencies import Context, session_bytes
from cottention.server.api.exception_handlers import add_error_handlers
from cottention.server.api.openapi import publish
from cottention.server.config import ServerConfig
from cottention.server.generation.async_engine import AsyncEngine
from cottention.server.generation.chat_template import ChatTemplate
from cottention.server.http.request_id import HEADER, RequestIdMiddleware
from cottention.server.limits.api_keys import (
    NAME_LENGTH,
    ApiKey,
    ApiKeyMiddleware,
    owner_id,
    requires_key,
)
from cottention.server.limits.key_limits import KeyLimits
from cottention.server.limits.rate_limit import KeyUsage, RateLimitMiddleware
from cottention.server.observability.access_log import AccessLogMiddleware
from cottention.server.observability.metrics import make_registry
from cottention.server.schemas.chat import ChatRequest
from cottention.server.schemas.completions import CompletionRequest
from cottention.server.schemas.sessions import AppendRequest, ForkRequest, SessionRequest
from cottention.server.sessions.turn_queue import TurnQueue
from cottention.server.version import package_version

if TYPE_CHECKING:  # it brings torch with it, which the server does not know
    from cottention.engine.sessions.manager import SessionManager

ROUTERS = (
    completions.router,
    chat.router,
    snapshots.router,
    session_events.router,
    sessions.router,
    tokenize.router,
    status.router,
)
BODIES = (
    CompletionRequest,
    ChatRequest,
    tokenize.TokenizeRequest,
    tokenize.TokenizeChatRequest,
    tokenize.DetokenizeRequest,
    SessionRequest,
    AppendRequest,
    ForkRequest,
)


def create_app(
    bridge: AsyncEngine,
    config: ServerConfig,
    keys: Sequence[ApiKey],
    kept: "SessionManager",
    template: ChatTemplate | None = None,
) -> FastAPI:
    """An application that serves the bridge's engine from its start-up to its shutdown.

    keys: those of which a client must send one, if there are any.
    kept: the sessions, which are whose they were when it ends.
    """
    turns = TurnQueue(kept)
    app = _new_app(bridge, turns)
    name = config.served_model_name or bridge.engine.name
    cost = session_bytes(bridge.engine, config)
    registry = make_registry(bridge, kept.sizes, cost, name)
    app.state.context = Context(bridge, config, registry, kept, turns, template)
    for router in ROUTERS:
        app.include_router(router)
    publish(app, BODIES, lambda path: requires_key(path, config))
    add_error_handlers(app)
    _add_middleware(app, keys, config, bridge)
    return app


def _new_app(bridge: AsyncEngine, turns: TurnQueue) -> FastAPI:
    """Without endpoints: its life is the engine's, and ends when no turn is left to be kept."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        bridge.start()
        yield
        await asyncio.to_thread(bridge.stop)
        await turns.wait_settled()

    # The interactive pages would be fetched from elsewhere; /openapi.json is all there is here.
    return FastAPI(
        title="cottention-server",
        version=package_version(),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )


def _usage_by_owner(keys: Sequence[ApiKey], config: ServerConfig) -> dict[str, KeyUsage]:
    """One for each key; without keys, one for all clients."""
    if not keys:
        return {"": KeyUsage("", KeyLimits.from_config(config))}
    owners = [(owner_id(key.secret), key) for key in keys]
    return {owner: KeyUsage(key.name or owner[:NAME_LENGTH], key.limits) for owner, key in owners}


def _add_middleware(
    app: FastAPI, keys: Sequence[ApiKey], config: ServerConfig, bridge: AsyncEngine
) -> None:
    """From the innermost to the outermost: a refused key is seen by pages and has an id, too."""
    usage = _usage_by_owner(keys, config)
    app.add_middleware(RateLimitMiddleware, usage_by_owner=usage)
    app.add_middleware(
        ApiKeyMiddleware, owners=list(usage) if keys else [], metrics_key=config.metrics_key
    )
    if config.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origin,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[HEADER, "Retry-After", "ETag"],
        )
    table = bridge.engine.tokenizer.written_bytes
    app.add_middleware(
        AccessLogMiddleware, num_characters=config.log_prompt_characters, table=table
    )
    app.add_middleware(RequestIdMiddleware)
