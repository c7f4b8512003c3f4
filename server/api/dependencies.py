"""The context that endpoints depend on: engine, settings, sessions, metrics, key limits."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastapi import Depends, Request, Response
from prometheus_client import CollectorRegistry

from cottention.engine.encoding import Capability
from cottention.engine.sessions.memory_usage import SessionBytes
from cottention.server.config import ServerConfig
from cottention.server.generation.async_engine import AsyncEngine
from cottention.server.generation.cancellation import RunningRequests
from cottention.server.generation.chat_template import ChatTemplate, UnusableTemplate
from cottention.server.http.body import Pace, shown
from cottention.server.http.body_memory import BodyMemory
from cottention.server.http.errors import ApiError
from cottention.server.idempotency.keys import IdempotencyKeys
from cottention.server.limits.key_limits import KeyLimits, least
from cottention.server.limits.rate_limit import counting_read, limits_of
from cottention.server.observability.access_log import AccessLog
from cottention.server.replicas.replicas import Replicas
from cottention.server.responses.running import RunningResponses
from cottention.server.sessions.journal import JournalWriter
from cottention.server.sessions.reads import ReadLimit
from cottention.server.sessions.turn_queue import TurnQueue, owner_of

if TYPE_CHECKING:  # these import torch, which the server must not load
    from cottention.engine.engine import Engine
    from cottention.engine.scheduling.context_policy import ContextPolicies
    from cottention.engine.sessions.manager import SessionManager
    from cottention.engine.text.base import BaseTokenizer


MAX_IGNORED_KEYS = 64
"""Unknown keys that are logged; there is no end to those that clients may send."""

logger = logging.getLogger("cottention")


class IgnoredKeys:
    """Logs each unknown key of chat messages once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._logged: set[str] = set()

    def warn(self, keys: Iterable[str]) -> None:
        """Log the keys that are new, up to MAX_IGNORED_KEYS of them in all."""
        with self._lock:
            for key in keys:
                if key not in self._logged and len(self._logged) < MAX_IGNORED_KEYS:
                    self._logged.add(key)
                    logger.warning("unknown keys of chat messages are ignored: %s", shown(key))


@dataclass(frozen=True, slots=True)
class Context:
    """Shared by all requests of an application, except `limits`, which are those of the key.

    session_manager, turn_queue, idempotency_keys: None where the model is an encoder, which has no
    sessions. replicas: None where no other server has them, nor the next start of this one.
    """

    engine: AsyncEngine
    config: ServerConfig
    registry: CollectorRegistry
    session_manager: "SessionManager | None"
    turn_queue: TurnQueue | None
    idempotency_keys: IdempotencyKeys | None
    replicas: Replicas | None
    reads: ReadLimit
    bodies: BodyMemory
    running: RunningRequests
    access_log: AccessLog
    template: ChatTemplate | UnusableTemplate | None = None
    limits: KeyLimits = KeyLimits()
    ignored_keys: IgnoredKeys = field(default_factory=IgnoredKeys)
    responses: RunningResponses = field(default_factory=RunningResponses)

    @property
    def sessions(self) -> "SessionManager":
        """The session manager; not for an encoder."""
        assert self.session_manager is not None
        return self.session_manager

    @property
    def turns(self) -> TurnQueue:
        """The turns of sessions; not for an encoder."""
        assert self.turn_queue is not None
        return self.turn_queue

    @property
    def journal(self) -> JournalWriter | None:
        """Of turns that go on without their client; None where none could without this server."""
        return None if self.replicas is None else self.replicas.writer

    @property
    def is_one_of_many(self) -> bool:
        """Whether other servers may have the same sessions."""
        return self.sessions.key_ledger is not None

    @property
    def keys(self) -> IdempotencyKeys:
        """The requests with idempotency keys; not for an encoder."""
        assert self.idempotency_keys is not None
        return self.idempotency_keys

    @property
    def tokenizer(self) -> "BaseTokenizer":
        """The model's tokenizer; an encoder's has what /tokenize and /detokenize use of it."""
        return cast("BaseTokenizer", self.engine.engine.tokenizer)

    @property
    def policies(self) -> "ContextPolicies":
        """The context policies that the engine supports; not for an encoder."""
        return cast("Engine", self.engine.engine).policies

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What the served model can do; chats where it has a template."""
        can_chat = isinstance(self.template, ChatTemplate)
        return tuple(x for x in self.engine.engine.capabilities if x != "chat" or can_chat)

    @property
    def max_text_tokens(self) -> int:
        """Tokens of the longest text that can be embedded."""
        return self.engine.engine.max_text_tokens

    @property
    def default_sampling_params(self) -> Mapping[str, Any]:
        """The model's own values of sampling parameters that a request does not have."""
        return self.engine.engine.default_sampling_params

    @property
    def model_name(self) -> str:
        """The id of the served model."""
        return self.config.served_model_name or self.engine.engine.name

    @property
    def max_body_bytes(self) -> int:
        """Maximum length of this request's body."""
        return least(self.config.max_body_bytes, self.limits.max_body_bytes)

    @property
    def max_snapshot_bytes(self) -> int:
        """Maximum length of a snapshot that is sent to this server; not for an encoder."""
        return min(self.config.max_snapshot_bytes, self.sessions.max_snapshot_nbytes)

    @property
    def pace(self) -> Pace:
        """How slowly a request's body may come."""
        return Pace(self.config.receive_seconds, self.config.receive_rate)

    @property
    def max_tokens(self) -> int:
        """Maximum `max_tokens` of this request."""
        return least(self.engine.engine.config.max_tokens_limit, self.limits.max_tokens)

    @property
    def session_bytes(self) -> SessionBytes:
        """The memory and disk space of one session; not for an encoder."""
        return session_bytes(cast("Engine", self.engine.engine), self.config)

    @property
    def softmax_bytes_per_token(self) -> int:
        """What a softmax model of this shape would keep of each token; not for an encoder."""
        return cast("Engine", self.engine.engine).spec.softmax_bytes_per_token

    @property
    def trained_length(self) -> int | None:
        """Context length that the model was trained on, in tokens; it is not a limit.

        None where the model's files do not say.
        """
        return self.engine.engine.model_config.trained_length


def session_bytes(engine: "Engine", config: ServerConfig) -> SessionBytes:
    """The memory and disk space of one session of this engine with these settings."""
    return SessionBytes.of(
        engine.spec,
        num_ids=engine.tokenizer.num_ids,
        window=engine.policies.window,
        max_checkpoints=config.session_checkpoints,
        max_event_log_bytes=config.session_event_log_bytes,
    )


async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return replace(context, limits=limits_of(request.scope))


@contextlib.contextmanager
def reading(request: Request, context: Context) -> Iterator[None]:
    """Count a read of stored bytes, in its key's requests and in all. Raises ApiError 429."""
    with counting_read(request.scope), context.reads.reading(owner_of(request)):
        yield


async def elsewhere(
    request: Request,
    context: Context,
    session_id: str,
    is_here: Callable[[], bool],
    raw: bytes = b"",
) -> Response | None:
    """As Replicas.elsewhere; None where no other server has sessions."""
    if context.replicas is None:
        return None
    return await context.replicas.elsewhere(request, raw, owner_of(request), session_id, is_here)


ContextDep = Annotated[Context, Depends(_context)]


PATHS: Mapping[Capability, str] = {
    "completions": "POST /v1/completions",
    "chat": "POST /v1/chat/completions",
    "sessions": "/v1/sessions",
    "embeddings": "POST /v1/embeddings",
    "fill-mask": "POST /v1/fill-mask",
}
"""Where each of a model's capabilities is used."""


def check_capability(wanted: Capability, context: Context) -> None:
    """Raise ApiError 400 for what the served model cannot do; it says what the model can."""
    model = context.engine.engine
    if wanted not in model.capabilities:
        able = ", ".join(f"{each} ({PATHS[each]})" for each in context.capabilities)
        message = f"the model {shown(context.model_name)} does not serve {wanted}; it serves {able}"
        if wanted == "embeddings" and "completions" in model.capabilities:
            message += "; started with --embeddings, the server also gives its embeddings"
        raise ApiError(400, message, param="model", code="unsupported_by_model")


def requires(wanted: Capability) -> Any:
    """A dependency of endpoints that the served model may be unable to serve."""

    async def check(context: ContextDep) -> None:
        check_capability(wanted, context)

    return Depends(check)
