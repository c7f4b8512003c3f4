"""A response from its parsed request to the beginning of its generation, here or once again."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cottention.engine.scheduling.client import Client
from cottention.engine.sessions.store.journal import JournaledTurn
from cottention.server.api.dependencies import Context
from cottention.server.api.journaled import repeatable
from cottention.server.generation.cancellation import Cancellation
from cottention.server.generation.output_stream import OutputStream
from cottention.server.generation.request import GenerationRequest, ParsedRequest
from cottention.server.responses.run import Keeping, ResponseRun
from cottention.server.responses.running import RunningResponse
from cottention.server.responses.values import ResponseStore
from cottention.server.responses.writer import ResponseWriter
from cottention.server.schemas.responses import JsonObject
from cottention.server.schemas.responses_api import ResponseRequest
from cottention.server.sessions.live_events import LiveEvents

if TYPE_CHECKING:  # they import torch, which the server must not load
    from cottention.engine.sessions.types import AdoptedTurn
    from cottention.engine.state.session_state import SessionState

NOTE = (
    "this response is kept until the server ends, or until it expires: start the server with"
    " --session-dir to keep responses longer"
)


@dataclass(frozen=True, slots=True)
class ParsedResponse:
    """A body, and the chat that it asks for. is_kept: whether the response is stored."""

    body: ResponseRequest
    chat: ParsedRequest
    is_kept: bool

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt, as if it followed nothing."""
        return self.chat.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class Asked:
    """One request for a response. name: the id of its answer. deadline: by the event loop's clock.

    response_id, created: the response's. entry: what is journaled of it, known: what another server
    has done of it; None: nothing.
    """

    owner: str
    name: str
    parsed: ParsedResponse
    response_id: str
    created: int
    deadline: float | None
    client: Client
    cancellation: Cancellation
    entry: JournaledTurn | None = None
    known: "AdoptedTurn | None" = None


@dataclass(frozen=True, slots=True)
class BegunResponse:
    """A response whose generation has begun. stack: what ends with it; it must be closed."""

    run: ResponseRun
    writer: ResponseWriter
    running: RunningResponse
    request: GenerationRequest
    stream: OutputStream
    stack: AsyncExitStack


async def begin_response(
    context: Context, asked: Asked, start: "SessionState | None"
) -> BegunResponse:
    """Begin to generate. start: the state to go on from; None: none, and none is kept.

    Raises ParameterError, ApiError and EngineStoppedError.
    """
    parsed, owner = asked.parsed, asked.owner
    body, chat = parsed.body, parsed.chat
    request = (
        chat.build()
        if start is None
        else chat.build_turn(start, context.tokenizer, context.policies)
    )
    replayed: Sequence[int] | None = None
    if asked.entry is not None:
        request, replayed = repeatable(request, asked.entry, asked.known)
    stream = await context.engine.generate(
        asked.name,
        request,
        start=start,
        deadline=asked.deadline,
        client=asked.client,
        cache=chat.cache_use(owner) if start is None else None,
        replayed=replayed,
    )
    asked.cancellation.attach(stream)
    writer = ResponseWriter(_base(asked, context))
    run = ResponseRun(stream, request, writer, context.tokenizer)
    items = _with_ids(body.input, writer.response["id"])
    if parsed.is_kept:
        run.keep(Keeping(store_of(context), owner, items, context.policies.new_session(None)))
    live = None
    if body.background:
        turn = None if asked.entry is None else asked.entry.turn
        live = LiveEvents(context.config.session_event_log_bytes, turn)
    running = RunningResponse(writer, items, asked.cancellation, live)
    stack = AsyncExitStack()
    stack.callback(stream.close)
    stack.enter_context(context.responses.entered(owner, running))
    return BegunResponse(run, writer, running, request, stream, stack)


def _base(asked: Asked, context: Context) -> JsonObject:
    """A response's object, but for what comes with its output."""
    parsed = asked.parsed
    body, params = parsed.body, parsed.chat.params
    tools = [{"type": "function", **tool["function"]} for tool in body.tools]
    choice = body.tool_choice or "auto"
    if isinstance(choice, dict):
        choice = {"type": "function", "name": choice["function"]["name"]}
    note = {"note": NOTE} if parsed.is_kept and not is_durable(context) else {}
    return {
        "id": asked.response_id,
        "object": "response",
        "created_at": asked.created,
        "model": context.model_name,
        "background": body.background,
        "store": parsed.is_kept,
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        "parallel_tool_calls": body.parallel_tool_calls,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "text": {"format": _format_of(body)},
        "tool_choice": choice,
        "tools": tools,
        "truncation": body.truncation,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "user": None,
        **note,
    }


def _format_of(body: ResponseRequest) -> JsonObject:
    given = None if body.text is None else body.text.format
    if given is None:
        return {"type": "text"}
    return {"type": given["type"], **given.get("json_schema", {})}


def _with_ids(items: Sequence[JsonObject], response_id: str) -> list[JsonObject]:
    digits = response_id.removeprefix("resp_")
    prefixes = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}
    return [
        {"id": f"{prefixes[item['type']]}_{digits}i{place}", **item}
        for place, item in enumerate(items)
    ]


def is_durable(context: Context) -> bool:
    """Whether stored responses outlive the server."""
    return context.config.session_dir is not None or context.config.session_store is not None


def store_of(context: Context) -> ResponseStore:
    """The stored responses."""
    return ResponseStore(context.sessions, context.config.response_ttl_seconds)
