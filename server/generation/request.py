"""Generation requests: what the engine and the response formatters get.

`ParsedRequest` is a validated body with tokenized prompts. `ParsedRequest.build` makes a
`GenerationRequest` of it; for a session's turn `build_turn` does, once the session's state is
known, because the prompt depends on it. What belongs to one call (deadline, cache scope, session
state) is an argument of `AsyncEngine.generate`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cottention.engine.sampling_params import SamplingParams, out_of_vocabulary
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


MAX_INLINE_TOKENS = 16 * 1024
"""Longer token lists are processed in a thread, to keep the event loop responsive."""

DEFAULT_STREAM_OPTIONS = StreamOptions.model_validate({})


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What a response contains besides its text.

    echo: each prompt before its text. logprobs: number of alternatives per generated token, None
    for no log-probabilities. prompt_logprobs: the same for prompts. token_ids: of prompt and text.
    tokens_as_ids: tokens are named `token_id:N` in log-probabilities.
    """

    echo: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    token_ids: bool = False
    tokens_as_ids: bool = False

    @property
    def is_text_only(self) -> bool:
        """Whether a response has text and nothing else."""
        return self == OutputOptions(tokens_as_ids=self.tokens_as_ids)


@dataclass(frozen=True, slots=True)
class TurnOptions:
    """The session that a turn continues, and what happens on conflict, cancellation, disconnect."""

    session_id: str
    on_conflict: OnConflict = "error"
    on_cancel: OnCancel = "keep"
    on_disconnect: OnDisconnect = "cancel"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Prompts, how to sample their continuations, and what the response contains.

    prompts: token ids of each prompt. echoes: the text of each prompt, empty unless echoed.
    num_choices: returned for each prompt: all `params.n` of them, or the best.
    """

    prompts: list[list[int]]
    params: SamplingParams
    output: OutputOptions
    echoes: list[str]
    num_choices: int = 1
    is_stream: bool = False
    stream_options: StreamOptions = DEFAULT_STREAM_OPTIONS
    priority: int = 0

    @property
    def needs_token_ids(self) -> bool:
        """Whether the response, or the choice of the best, needs more than text."""
        return self.params.logprobs is not None or not self.output.is_text_only

    @property
    def is_slow_to_format(self) -> bool:
        """Whether the response repeats prompts too long to be formatted on the event loop."""
        return self.num_prompt_tokens > MAX_INLINE_TOKENS and not self.output.is_text_only

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A validated body, its sampling parameters and its tokenized prompts.

    echoes: the text of each prompt, if prompts are echoed.
    add_special_tokens_if_empty: the tokenizer's special tokens are added to the prompt of a turn
    if its session is empty.
    continuation: the prompt of a turn if its session is not empty; None: the same as if it were.
    """

    body: SamplingBody
    params: SamplingParams
    output: OutputOptions
    prompts: list[list[int]]
    echoes: Sequence[str] = ()
    add_special_tokens_if_empty: bool = False
    continuation: ChatContinuation | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, as if they followed nothing."""
        return sum(map(len, self.prompts))

    @property
    def turn(self) -> TurnOptions | None:
        """Of a session's turn; None without a session."""
        body = self.body
        if body.session_id is None:
            return None
        return TurnOptions(body.session_id, body.on_conflict, body.on_cancel, body.on_disconnect)

    def build(self) -> GenerationRequest:
        """The request, without a session."""
        return self._build(self.prompts)

    def build_turn(self, start: "SessionState", tokenizer: "Tokenizer") -> GenerationRequest:
        """The request of a turn that continues `start`."""
        (first,) = self.prompts
        prompt = turn_prompt(
            first,
            start,
            tokenizer,
            add_special_tokens_if_empty=self.add_special_tokens_if_empty,
            continuation=self.continuation,
        )
        return self._build([prompt])

    def _build(self, prompts: list[list[int]]) -> GenerationRequest:
        body = self.body
        return GenerationRequest(
            prompts,
            self.params,
            self.output,
            list(self.echoes) or [""] * len(prompts),
            num_choices=body.n,
            is_stream=body.stream,
            stream_options=body.stream_options or DEFAULT_STREAM_OPTIONS,
            priority=body.priority,
        )


def prefill_request(prompt_ids: list[int]) -> GenerationRequest:
    """A prompt that is added to a session without generating anything."""
    return GenerationRequest([prompt_ids], SamplingParams(max_tokens=0), OutputOptions(), [""])


def turn_prompt(
    prompt_ids: list[int],
    start: "SessionState",
    tokenizer: "Tokenizer",
    *,
    add_special_tokens_if_empty: bool = False,
    continuation: ChatContinuation | None = None,
) -> list[int]:
    """Token ids that a turn adds to the session `start`; the parameters are ParsedRequest's."""
    if not start.num_tokens:
        return tokenizer.framed(prompt_ids) if add_special_tokens_if_empty else prompt_ids
    return prompt_ids if continuation is None else continuation.after(start.past, tokenizer)


def encode_text(text: str, tokenizer: "Tokenizer", *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text, with or without the special tokens that its tokenizer adds."""
    ids = tokenizer.encode(text)
    return tokenizer.framed(ids) if add_special_tokens else ids


def decode_ids(ids: list[int], tokenizer: "Tokenizer", param: str) -> str:
    """The text of token ids, special tokens included. Raises ApiError for an unknown id."""
    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.num_ids:
        raise invalid(param, out_of_vocabulary(f"ids in {param}", ids, tokenizer.num_ids))
    return tokenizer.written(ids)


def truncate_prompt(ids: list[int], body: SamplingBody, trained_length: int) -> list[int]:
    """A prompt truncated to `truncate_prompt_tokens`; -1 stands for `trained_length`."""
    if body.truncate_prompt_tokens is None:
        return ids
    length = trained_length if body.truncate_prompt_tokens == -1 else body.truncate_prompt_tokens
    return ids[-length:] if body.truncation_side == "left" else ids[:length]
