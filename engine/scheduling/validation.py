"""From what a caller says to a request: text becomes ids, and what cannot be is refused.

Owns the order of the checks. Does not know queues, rows or steps; may be called from any thread.

What a request may ask of this engine: its vocabulary, its pool, its longest answer.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

from cottention.engine.config import EngineConfig
from cottention.engine.errors import ParameterError
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.scheduling.context_policy import ContextPolicies
from cottention.engine.scheduling.request import Request
from cottention.engine.state.pool import StatePool
from cottention.engine.state.session_state import SessionState
from cottention.engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Ids are 0 to num_ids − 1; those in sampleable_ids may be drawn."""

    num_ids: int
    sampleable_ids: frozenset[int]
    num_slots: int
    max_tokens: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, pool: StatePool, config: EngineConfig) -> Self:
        """Those of an engine with these parts."""
        sampleable = frozenset(tokenizer.sampleable_ids)
        return cls(tokenizer.num_ids, sampleable, pool.num_slots, config.max_tokens_limit)

    def check(
        self, prompt_ids: Sequence[int], params: SamplingParams, start: SessionState | None
    ) -> None:
        """Raises ParameterError naming the field and what it allows."""
        if not prompt_ids and (start is None or not start.num_tokens):
            raise ParameterError("prompt", "prompt must hold at least one token; it is empty")
        if start is not None:
            _check_turn(params)
        self._check_ids("prompt", "prompt ids", prompt_ids)
        self._check_ids("stop_token_ids", "stop_token_ids", params.stop_token_ids)
        self._check_ids("logit_bias", "the ids in logit_bias", params.logit_bias)
        if params.allowed_token_ids is not None:
            self._check_allowed(params.allowed_token_ids)
        _check_most("n", params.n, self.num_slots)
        _check_most("max_tokens", params.max_tokens, self.max_tokens)

    def check_any_is_left(self, params: SamplingParams, barred: Collection[int]) -> None:
        """Raises ParameterError where no id can be the first: barred are those that may not be."""
        allowed = params.allowed_token_ids
        left = self.sampleable_ids if allowed is None else self.sampleable_ids.intersection(allowed)
        if params.max_tokens and left.issubset(barred):
            raise ParameterError(
                "stop_token_ids" if allowed is None else "allowed_token_ids",
                "no token is left to begin with: allowed_token_ids, bad_words and, while there are"
                " fewer than min_tokens, stop_token_ids and the model's end forbid every one",
            )

    def _check_ids(self, param: str, what: str, ids: Collection[int]) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self.num_ids:
            raise ParameterError(param, f"{what} must be from 0 to {self.num_ids - 1}")

    def _check_allowed(self, allowed: Sequence[int]) -> None:
        self._check_ids("allowed_token_ids", "allowed_token_ids", allowed)
        if self.sampleable_ids.isdisjoint(allowed):
            raise ParameterError(
                "allowed_token_ids", "allowed_token_ids must hold an id that the tokenizer has"
            )


def _check_turn(params: SamplingParams) -> None:
    """What a session's turn cannot have: a session has one future, and its past is not read."""
    if params.n > 1:
        raise ParameterError("n", f"n must be 1 with a session; it is {params.n}: fork the session")
    if params.prompt_logprobs is not None:
        raise ParameterError("prompt_logprobs", "prompt_logprobs is not told with a session")


def _check_most(param: str, value: int, most: int) -> None:
    if value > most:
        raise ParameterError(param, f"{param} must be at most {most}; it is {value}")


Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class RequestValidator:
    """Makes requests. eos_token_ids: the model's own ends."""

    tokenizer: Tokenizer
    eos_token_ids: Sequence[int]
    limits: RequestLimits
    policies: ContextPolicies

    def ids(self, prompt: Prompt) -> Sequence[int]:
        """A prompt's ids. Raises ParameterError."""
        if not isinstance(prompt, str):
            return prompt
        try:
            return self.tokenizer.framed(self.tokenizer.encode(prompt))
        except TypeError:  # what the tokenizers library says to text that is no Unicode
            raise ParameterError("prompt", "prompt has a lone surrogate (no character)") from None

    def request(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        start: SessionState | None,
    ) -> Request:
        """Raises ParameterError, ContextPolicyError."""
        self.limits.check(prompt_ids, params, start)
        if start is not None:
            start = self.policies.settled(start, params)
        grid = self.policies.grid(prompt_ids, params, start)
        ends = self.eos_token_ids
        request = Request.new(request_id, prompt_ids, params, self.tokenizer, ends, start, grid)
        self.limits.check_any_is_left(params, request.choices[0].masked_token_ids())
        return request
