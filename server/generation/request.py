"""A checked request, ready for the engine: ids, parameters, and what its answer is to tell.

Owns truncation and the text of ids. Does not know how answers look.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cottention.engine.sampling_params import SamplingParams
from cottention.server.generation.chat_template import ChatContinuation
from cottention.server.http.errors import invalid
from cottention.server.schemas.sampling import (
    OnCancel,
    OnConflict,
    OnDisconnect,
    SamplingBody,
    StreamOptions,
)

if TYPE_CHECKING:
    from cottention.engine.state.session_state import SessionState
    from cottention.engine.text.tokenizer import Tokenizer


QUICK_IDS = 16 * 1024
"""More ids than these are gone through in a thread; fewer would only wait for it."""


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What an answer tells beside its text.

    echo: each prompt before its text. logprobs: how many alternatives beside each id; None: none.
    prompt_logprobs: the same of the prompt. token_ids: of prompt and text.
    tokens_as_ids: name tokens by their numbers.
    """

    echo: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    token_ids: bool = False
    tokens_as_ids: bool = False

    @property
    def is_text_alone(self) -> bool:
        """Whether an answer is nothing but text."""
        return self == OutputOptions(tokens_as_ids=self.tokens_as_ids)


@dataclass(frozen=True, slots=True)
class TurnOptions:
    """Which session an order continues, whom it gives way to, what cuts it and what that leaves."""

    session_id: str
    on_conflict: OnConflict = "error"
    on_cancel: OnCancel = "keep"
    on_disconnect: OnDisconnect = "cancel"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Prompts, how each is continued, and how the answer is told.

    echoes: the text of each prompt, where it is to be told.
    num_stop: stop strings that the client sent.
    num_choices: told for each prompt; the best of params.n, or all of them.
    cache_scope: whose prompts may share what was read of them; each other scope is apart.
    turn: of a session, where it is one; start: the session before it, once that is known.
    frames_first: if that holds nothing, the prompt is to be framed.
    continuation: what the prompt is instead, if that holds something.
    timeout: seconds that it may take; deadline: when they are over, by the event loop's clock.
    """

    prompts: list[list[int]]
    echoes: list[str]
    params: SamplingParams
    details: OutputOptions
    num_choices: int
    is_stream: bool
    stream_options: StreamOptions
    priority: int
    request_id: str | None
    num_stop: int = 0
    cache_scope: str = ""
    turn: TurnOptions | None = None
    start: "SessionState | None" = None
    frames_first: bool = False
    continuation: ChatContinuation | None = None
    timeout: float | None = None
    deadline: float | None = None

    @property
    def needs_tokens(self) -> bool:
        """Whether ids are told, judged or kept, or text alone."""
        if self.start is not None or self.params.logprobs is not None:
            return True
        return not self.details.is_text_alone

    @property
    def tells_long_prompt(self) -> bool:
        """Whether wording the answer takes long enough to be done beside the event loop."""
        return self.num_prompt > QUICK_IDS and not self.details.is_text_alone

    @property
    def num_prompt(self) -> int:
        """Ids of all prompts."""
        return sum(map(len, self.prompts))


def order_of(
    body: SamplingBody,
    params: SamplingParams,
    details: OutputOptions,
    prompts: list[list[int]],
    echoes: Sequence[str] = (),
) -> GenerationRequest:
    """The order that a checked body amounts to."""
    return GenerationRequest(
        prompts=prompts,
        echoes=list(echoes) or [""] * len(prompts),
        params=params,
        details=details,
        num_choices=body.n,
        is_stream=body.stream,
        stream_options=body.stream_options or StreamOptions.model_validate({}),
        priority=body.priority,
        request_id=body.request_id,
        cache_scope=body.cache_salt or "",
        num_stop=len(body.stop),
        turn=_turn_of(body),
        timeout=body.timeout,
    )


def reading_order(prompt_ids: list[int]) -> GenerationRequest:
    """A prompt that a session reads and nothing answers."""
    return GenerationRequest(
        prompts=[prompt_ids],
        echoes=[""],
        params=SamplingParams(max_tokens=0),
        details=OutputOptions(),
        num_choices=1,
        is_stream=False,
        stream_options=StreamOptions.model_validate({}),
        priority=0,
        request_id=None,
    )


def _turn_of(body: SamplingBody) -> TurnOptions | None:
    if body.session_id is None:
        return None
    return TurnOptions(body.session_id, body.on_conflict, body.on_cancel, body.on_disconnect)


def read_text(text: str, tokenizer: "Tokenizer", *, is_framed: bool) -> list[int]:
    """Ids of a text, with or without the special ones that its tokenizer adds."""
    ids = tokenizer.encode(text)
    return tokenizer.framed(ids) if is_framed else ids


def in_session(
    order: GenerationRequest, start: "SessionState", tokenizer: "Tokenizer"
) -> GenerationRequest:
    """The order of a turn: what begins a text begins its session, and none of its later turns."""
    if start.num_tokens and order.continuation is not None:
        return replace(order, prompts=[order.continuation.after(start.past, tokenizer)])
    if start.num_tokens or not order.frames_first:
        return order
    return replace(order, prompts=[tokenizer.framed(ids) for ids in order.prompts])


def cut_prompt(ids: list[int], body: SamplingBody, trained_length: int) -> list[int]:
    """A prompt truncated as the body asks."""
    if body.truncate_prompt_tokens is None:
        return ids
    length = trained_length if body.truncate_prompt_tokens == -1 else body.truncate_prompt_tokens
    return ids[-length:] if body.truncation_side == "left" else ids[:length]


def text_of(ids: list[int], tokenizer: "Tokenizer", param: str) -> str:
    """Text of ids, special tokens written out. Raises ApiError for an id that there is not."""
    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.num_ids:
        raise invalid(param, f"{param} ids must be from 0 to {tokenizer.num_ids - 1}")
    written = tokenizer.written_bytes
    return b"".join(written[each] for each in ids).decode("utf-8", errors="replace")
