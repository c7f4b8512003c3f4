"""The FastAPI application.

Owns which endpoints there are, and the start and end of the engine's thread. Knows no signals.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from server import completions, status
from server.bridge import Bridge
from server.context import Context
from server.errors import add_error_handlers
from server.metrics import make_registry
from server.settings import ServerConfig
from server.version import package_version


def create_app(bridge: Bridge, config: ServerConfig) -> FastAPI:
    """An application that serves the bridge's engine from its start-up to its shutdown."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        bridge.start()
        yield
        await asyncio.to_thread(bridge.stop)

    # The interactive pages would be fetched from elsewhere; /openapi.json is all there is here.
    app = FastAPI(
        title="cottention-server",
        version=package_version(),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    registry = make_registry(bridge.stats, config.served_model_name or bridge.engine.name)
    app.state.context = Context(bridge, config, registry)
    add_error_handlers(app)
    app.include_router(completions.router)
    app.include_router(status.router)
    return app
