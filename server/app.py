"""The FastAPI application.

Owns which endpoints there are, what stands before them, and the start and end of the engine's
thread. Knows no signals.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from cottention.server import (
    capacity,
    chat,
    completions,
    session_events,
    sessions,
    snapshots,
    status,
    tokens,
)
from cottention.server.accounts import Account, Accounts
from cottention.server.bridge import Bridge
from cottention.server.chat_schemas import ChatRequest
from cottention.server.context import Context, session_bytes
from cottention.server.handlers import add_error_handlers
from cottention.server.journal import Journal
from cottention.server.key_files import NAME_LENGTH, ApiKey
from cottention.server.key_limits import KeyLimits
from cottention.server.keys import Keys, asks_for_key, owner_by
from cottention.server.metrics import make_registry
from cottention.server.openapi import publish
from cottention.server.request_ids import HEADER, RequestIds
from cottention.server.schemas import CompletionRequest
from cottention.server.session_schemas import AppendRequest, ForkRequest, SessionRequest
from cottention.server.settings import ServerConfig
from cottention.server.templates import ChatTemplate
from cottention.server.turns import Turns
from cottention.server.version import package_version
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

if TYPE_CHECKING:  # it brings torch with it, which the server does not know
    from cottention.engine.sessions import Sessions

ROUTERS = (
    completions.router,
    chat.router,
    snapshots.router,
    session_events.router,
    sessions.router,
    tokens.router,
    capacity.router,
    status.router,
)
BODIES = (
    CompletionRequest,
    ChatRequest,
    tokens.TokenizeRequest,
    tokens.TokenizeChatRequest,
    tokens.DetokenizeRequest,
    SessionRequest,
    AppendRequest,
    ForkRequest,
)


def create_app(
    bridge: Bridge,
    config: ServerConfig,
    keys: Sequence[ApiKey],
    kept: "Sessions",
    template: ChatTemplate | None = None,
) -> FastAPI:
    """An application that serves the bridge's engine from its start-up to its shutdown.

    keys: those of which a client must send one, if there are any.
    kept: the sessions, which are whose they were when it ends.
    """
    turns = Turns(kept)
    app = _new_app(bridge, turns)
    name = config.served_model_name or bridge.engine.name
    cost = session_bytes(bridge.engine, config)
    registry = make_registry(bridge, kept.sizes, cost, name)
    app.state.context = Context(bridge, config, registry, kept, turns, template)
    for router in ROUTERS:
        app.include_router(router)
    publish(app, BODIES, lambda path: asks_for_key(path, config))
    add_error_handlers(app)
    _add_middleware(app, keys, config, bridge)
    return app


def _new_app(bridge: Bridge, turns: Turns) -> FastAPI:
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


def _accounts(keys: Sequence[ApiKey], config: ServerConfig) -> dict[str, Account]:
    """By owner; without keys, the one of everybody."""
    if not keys:
        return {"": Account("", KeyLimits.of(config))}
    owners = [(owner_by(key.secret), key) for key in keys]
    return {owner: Account(key.name or owner[:NAME_LENGTH], key.limits) for owner, key in owners}


def _add_middleware(
    app: FastAPI, keys: Sequence[ApiKey], config: ServerConfig, bridge: Bridge
) -> None:
    """From the innermost to the outermost: a refused key is seen by pages and has an id, too."""
    accounts = _accounts(keys, config)
    app.add_middleware(Accounts, accounts=accounts)
    app.add_middleware(Keys, owners=list(accounts) if keys else [], metrics_key=config.metrics_key)
    if config.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origin,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[HEADER, "Retry-After", "ETag"],
        )
    table = bridge.engine.tokenizer.written_bytes
    app.add_middleware(Journal, num_characters=config.log_prompt_characters, table=table)
    app.add_middleware(RequestIds)
