"""What every endpoint is given: the bridge to the engine, settings, figures, sessions, template."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request
from prometheus_client import CollectorRegistry

from cottention.engine.sessions.memory_usage import SessionBytes
from cottention.server.config import ServerConfig
from cottention.server.generation.async_engine import AsyncEngine
from cottention.server.generation.chat_template import ChatTemplate
from cottention.server.limits.key_limits import KeyLimits, least
from cottention.server.limits.rate_limit import limits_of
from cottention.server.sessions.turn_queue import TurnQueue

if TYPE_CHECKING:  # it brings torch with it, which the server does not know
    from cottention.engine.engine import Engine
    from cottention.engine.sessions.manager import SessionManager


@dataclass(frozen=True, slots=True)
class Context:
    """One per application, but for the limits, which are of the request's key."""

    bridge: AsyncEngine
    config: ServerConfig
    registry: CollectorRegistry
    sessions: "SessionManager"
    turns: TurnQueue
    template: ChatTemplate | None = None
    limits: KeyLimits = KeyLimits()

    @property
    def model_name(self) -> str:
        """The id of the served model."""
        return self.config.served_model_name or self.bridge.engine.name

    @property
    def max_body_bytes(self) -> int:
        """Of this request."""
        return least(self.config.max_body_bytes, self.limits.max_body_bytes)

    @property
    def max_tokens(self) -> int:
        """Most that this request may ask for."""
        return least(self.bridge.engine.config.max_tokens_limit, self.limits.max_tokens)

    @property
    def session_bytes(self) -> SessionBytes:
        """What one session takes here."""
        return session_bytes(self.bridge.engine, self.config)

    @property
    def trained_length(self) -> int:
        """Tokens that the model was trained to follow; it limits nothing here."""
        return self.bridge.engine.model_config.trained_length


def session_bytes(engine: "Engine", config: ServerConfig) -> SessionBytes:
    """What one session of this engine takes under these settings."""
    return SessionBytes.of(
        engine.spec,
        num_ids=engine.tokenizer.num_ids,
        window=engine.policies.window,
        max_checkpoints=config.session_checkpoints,
        max_outbox=config.session_event_log_bytes,
    )


async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return replace(context, limits=limits_of(request.scope))


ContextDep = Annotated[Context, Depends(_context)]
