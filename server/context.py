"""What every endpoint is given: the bridge to the engine, the settings, the figures."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from prometheus_client import CollectorRegistry

from server.bridge import Bridge
from server.settings import ServerConfig


@dataclass(frozen=True, slots=True)
class Context:
    """One per application."""

    bridge: Bridge
    config: ServerConfig
    registry: CollectorRegistry

    @property
    def model_name(self) -> str:
        """The id of the served model."""
        return self.config.served_model_name or self.bridge.engine.name


async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


ContextDep = Annotated[Context, Depends(_context)]
