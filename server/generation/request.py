"""Generation requests: what the engine and the response formatters get.

`ParsedRequest` is a validated body with tokenized prompts. `ParsedRequest.build` makes a
`GenerationRequest` of it; for a session's turn `build_turn` does, once the session's state is
known, because the prompt depends on it. What belongs to one call (deadline, cache scope, session
state) is an argument of `AsyncEngine.generate`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cottention.engine.sampling_params import SamplingParams, out_of_vocabulary
from cottention.engine.scheduling.prefill_stops import CacheUse
from cottention.server.generation.chat_template import ChatContinuation
from cottention.server.generation.tools.calls import CallFormat
from cottention.server.http.errors import invalid
from cottention.server.schemas.sampling import (
    CacheOptions,
    OnCancel,
    OnConflict,
    OnDisconnect,
    SamplingBody,
    StreamOptions,
)

if TYPE_CHECKING:
    from cottention.engine.scheduling.context_policy import ContextPolicies
    from cottention.engine.state.session_state import SessionState
    from cottention.engine.text.base import BaseTokenizer


MAX_INLINE_TOKENS = 16 * 1024
"""Longer token lists are processed in a thread, to keep the event loop responsive."""

STATE_ITEM_BYTES = 64
"""Bytes of a returned state that count as much as a token id or a log-probability."""

MAX_INLINE_ITEMS = 4 * 1024
"""Responses with more token ids and log-probabilities are formatted in a thread."""

DEFAULT_STREAM_OPTIONS = StreamOptions.model_validate({})
DEFAULT_CACHE_OPTIONS = CacheOptions.model_validate({})


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What a response contains besides its text.

    echo: each prompt before its text. logprobs: number of alternatives per generated token, None
    for no log-probabilities. prompt_logprobs: the same for prompts. token_ids: of prompt and text.
    tokens_as_ids: tokens are named `token_id:N` in log-probabilities.
    state_bytes: of the largest state that it may have, 0 for none.
    has_prompt_once: what it contains of a prompt is not repeated for each choice.
    calls: how its calls of functions are written; None for text alone.
    """

    echo: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    token_ids: bool = False
    tokens_as_ids: bool = False
    state_bytes: int = 0
    has_prompt_once: bool = False
    calls: CallFormat | None = None

    @property
    def is_text_only(self) -> bool:
        """Whether a response has text, or calls that are read from it, and nothing else."""
        return not (self.echo or self.items_per_token or self.items_per_prompt_token)

    @property
    def items_per_token(self) -> int:
        """Token ids and log-probabilities, alternatives included, for each generated token."""
        return self.token_ids + _num_logprobs(self.logprobs)

    @property
    def items_per_prompt_token(self) -> int:
        """The same for each token of a prompt, of which an echo is one more."""
        echoed = 1 + _num_logprobs(self.logprobs) if self.echo else 0
        return self.token_ids + _num_logprobs(self.prompt_logprobs) + echoed

    def num_prompt_items(self, num_prompt_tokens: int, num_choices: int) -> int:
        """Items of all prompts in a response with so many choices for each."""
        copies = 1 if self.has_prompt_once else num_choices
        return copies * num_prompt_tokens * self.items_per_prompt_token


def _num_logprobs(num_top: int | None) -> int:
    """Of one token, with so many alternatives; None for no log-probabilities."""
    return 0 if num_top is None else 1 + num_top


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
    num_reread: ids that a session's turn reads besides its prompt (`ContextPolicies.num_reread`).
    num_held: ids that the state holds which it continues. timings: whether the response has its
    times, and timings_per_token: each of its chunks.
    """

    prompts: list[list[int]]
    params: SamplingParams
    output: OutputOptions
    echoes: list[str]
    num_choices: int = 1
    is_stream: bool = False
    stream_options: StreamOptions = DEFAULT_STREAM_OPTIONS
    priority: int = 0
    num_reread: int = 0
    num_held: int = 0
    timings: bool = False
    timings_per_token: bool = False

    @property
    def needs_token_ids(self) -> bool:
        """Whether the response, or the choice of the best, needs more than text."""
        return self.params.logprobs is not None or not self.output.is_text_only

    @property
    def is_slow_to_format(self) -> bool:
        """Whether the response has too much of its prompts to be formatted on the event loop."""
        num_items = self.output.num_prompt_items(self.num_prompt_tokens, self.num_choices)
        return num_items > MAX_INLINE_ITEMS

    @property
    def items_per_token(self) -> int:
        """Token ids and log-probabilities of the response for each generated token."""
        return self.output.items_per_token

    @property
    def is_slow_to_submit(self) -> bool:
        """Whether it has too much to be checked on the event loop: ids, words, a grammar.

        Strings that are breakers of repetitions are searched in the whole vocabulary.
        """
        params = self.params
        if params.structured is not None:  # its grammar is compiled
            return True
        num_copies = params.n if params.has_penalty else 1
        num_listed = len(params.stop_token_ids) + len(params.allowed_token_ids or ())
        num_characters = 2 * sum(map(len, params.bad_words))
        size = self.num_read_tokens * num_copies + num_listed + num_characters
        return params.has_dry or size > MAX_INLINE_TOKENS

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def num_read_tokens(self) -> int:
        """Tokens that are read before the first is generated."""
        return self.num_prompt_tokens + self.num_reread


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A validated body, its sampling parameters and its tokenized prompts.

    echoes: the text of each prompt, if prompts are echoed.
    add_special_tokens_if_empty: the tokenizer's special tokens are added to the prompt of a turn
    if its session is empty.
    continuation: the prompt of a turn if its session is not empty; None: the same as if it were.
    boundaries: of a chat's only prompt, those of `CacheUse`.
    start: where the client keeps its state itself, the one that it goes on from.
    """

    body: SamplingBody
    params: SamplingParams
    output: OutputOptions
    prompts: list[list[int]]
    echoes: Sequence[str] = ()
    add_special_tokens_if_empty: bool = False
    continuation: ChatContinuation | None = None
    boundaries: tuple[int, ...] = ()
    start: "SessionState | None" = None

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

    @property
    def num_items(self) -> int:
        """Token ids, echoed tokens and log-probabilities that the response has at most.

        What is generated counts where the response is whole; a stream is read as it comes. A state
        counts in both.
        """
        body, output, params = self.body, self.output, self.params
        num_items = output.num_prompt_items(self.num_prompt_tokens, body.n)
        num_items += output.state_bytes // STATE_ITEM_BYTES
        if not body.stream:
            per_token = output.token_ids + _num_logprobs(body.num_alternatives(params.logprobs))
            num_items += len(self.prompts) * params.n * params.max_tokens * per_token
        return num_items

    def check_items(self, limit: int) -> None:
        """Raise ApiError 400 if the response could have more items than that."""
        num_items, output = self.num_items, self.output
        if num_items > limit:
            wanted = {
                "prompt_logprobs": output.prompt_logprobs is not None,
                "logprobs": output.logprobs is not None,
                "return_token_ids": output.token_ids,
                "echo": output.echo,
                "return_state": output.state_bytes > 0,
            }
            num_state = output.state_bytes // STATE_ITEM_BYTES
            counted = f", {num_state} of them for its state" if num_state else ""
            raise invalid(
                next((name for name, is_wanted in wanted.items() if is_wanted), "best_of"),
                f"a response has at most {limit} token ids, echoed tokens and log-probabilities"
                f" (--max-response-items), but this one may have {num_items}{counted}: ask for"
                " fewer choices, tokens or alternatives, or for a stream",
            )

    def cache_use(self, owner: str) -> CacheUse:
        """How its prompts use the prefix cache; those of other owners and salts are apart."""
        options = self.body.cache or DEFAULT_CACHE_OPTIONS
        scope = f"{owner}\n{self.body.cache_salt or ''}"
        return CacheUse(scope, options.read, options.write, self.boundaries)

    def build(self) -> GenerationRequest:
        """The request, without a session."""
        return self._build(self.prompts)

    def build_turn(
        self, start: "SessionState", tokenizer: "BaseTokenizer", policies: "ContextPolicies"
    ) -> GenerationRequest:
        """The request of a turn that continues `start`, which comes from `policies.settled`."""
        (first,) = self.prompts
        prompt = turn_prompt(
            first,
            start,
            tokenizer,
            add_special_tokens_if_empty=self.add_special_tokens_if_empty,
            continuation=self.continuation,
        )
        num_reread = policies.num_reread(start, len(prompt))
        return replace(self._build([prompt]), num_reread=num_reread, num_held=start.num_tokens)

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
            timings=body.timings or body.timings_per_token,
            timings_per_token=body.timings_per_token,
        )


def prefill_request(prompt_ids: list[int], num_reread: int) -> GenerationRequest:
    """A prompt that is added to a session without generating anything."""
    params, output = SamplingParams(max_tokens=0), OutputOptions()
    return GenerationRequest([prompt_ids], params, output, [""], num_reread=num_reread)


def turn_prompt(
    prompt_ids: list[int],
    start: "SessionState",
    tokenizer: "BaseTokenizer",
    *,
    add_special_tokens_if_empty: bool = False,
    continuation: ChatContinuation | None = None,
) -> list[int]:
    """Token ids that a turn adds to the session `start`; the parameters are ParsedRequest's."""
    if not start.num_tokens:
        return tokenizer.framed(prompt_ids) if add_special_tokens_if_empty else prompt_ids
    return prompt_ids if continuation is None else continuation.after(start.past, tokenizer)


def encode_text(text: str, tokenizer: "BaseTokenizer", *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text, with or without the special tokens that its tokenizer adds."""
    ids = tokenizer.encode(text)
    return tokenizer.framed(ids) if add_special_tokens else ids


def decode_ids(ids: list[int], tokenizer: "BaseTokenizer", param: str) -> str:
    """The text of token ids, special tokens included. Raises ApiError for an unknown id."""
    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.num_ids:
        raise invalid(param, out_of_vocabulary(f"ids in {param}", ids, tokenizer.num_ids))
    return tokenizer.written(ids)


def truncate_prompt(ids: list[int], body: SamplingBody, trained_length: int | None) -> list[int]:
    """A prompt truncated to `truncate_prompt_tokens`; -1 stands for `trained_length`.

    Where that is None, nothing is truncated.
    """
    length = trained_length if body.truncate_prompt_tokens == -1 else body.truncate_prompt_tokens
    if length is None:
        return ids
    return ids[-length:] if body.truncation_side == "left" else ids[:length]
