"""A prompt and its parameters to a `Request`: tokenization, and the checks of an engine's limits.

May be used from any thread.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from cottention.engine import ops
from cottention.engine.config import EngineConfig
from cottention.engine.encoding import EncodeParams
from cottention.engine.errors import ParameterError
from cottention.engine.grammar.compiler import Grammar, GrammarCompiler
from cottention.engine.sampling.dry import BreakerIds, RepeatRules
from cottention.engine.sampling.token_constraints import TokenConstraints, encode_bad_words
from cottention.engine.sampling_params import SamplingParams, out_of_vocabulary, shortened
from cottention.engine.scheduling.context_policy import ContextPolicies
from cottention.engine.scheduling.request import Request
from cottention.engine.state.pool import StatePool
from cottention.engine.state.session_state import SessionState
from cottention.engine.text.base import BaseTokenizer


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a request may ask of an engine.

    num_ids: ids are 0 to num_ids − 1. sampleable_ids: those that may be generated. num_slots: limit
    of `n`. max_tokens: limit of `max_tokens`. has_embeddings: prompts may be embedded.
    """

    num_ids: int
    sampleable_ids: frozenset[int]
    num_slots: int
    max_tokens: int
    has_embeddings: bool = False

    @classmethod
    def of(cls, tokenizer: BaseTokenizer, pool: StatePool, config: EngineConfig) -> Self:
        """The limits of an engine with this tokenizer, pool and configuration."""
        sampleable = frozenset(tokenizer.sampleable_ids)
        return cls(
            tokenizer.num_ids,
            sampleable,
            pool.num_slots,
            config.max_tokens_limit,
            config.embeddings,
        )

    def check_prompt(
        self, prompt_ids: Sequence[int], params: SamplingParams, start: SessionState | None
    ) -> None:
        """Raise ParameterError, naming the field and what it allows, for a prompt beyond them."""
        if not prompt_ids and (start is None or not start.num_tokens):
            raise ParameterError("prompt", "prompt must hold at least one token; it is empty")
        if params.encode is not None:
            self._check_encode(params, params.encode, start)
        if start is not None:
            _check_turn(params)
        self._check_ids("prompt", "prompt ids", prompt_ids)

    def check_params(self, params: SamplingParams) -> None:
        """The same for parameters."""
        self._check_set("stop_token_ids", params.stop_token_ids)
        self._check_set("logprob_token_ids", params.logprob_token_ids or ())
        self._check_ids("logit_bias", "ids in logit_bias", params.logit_bias)
        if params.allowed_token_ids is not None:
            self._check_allowed(params.allowed_token_ids)
        _check_at_most("n", params.n, self.num_slots, "the engine's slots")
        _check_at_most("max_tokens", params.max_tokens, self.max_tokens, "the engine's limit")

    def check_first_token(
        self, params: SamplingParams, constraints: TokenConstraints, grammar: Grammar | None
    ) -> None:
        """Raise ParameterError where constraints and grammar leave no id for the first token."""
        if constraints.early_mask is None:  # what follows takes as long as a step of a small model
            return
        is_sampleable = torch.zeros(self.num_ids, dtype=torch.bool)
        is_sampleable[torch.tensor([*self.sampleable_ids])] = True
        if grammar is not None:
            is_sampleable &= ops.unpack_bitmask(grammar.first_mask)[0, : self.num_ids]
        if params.max_tokens and not constraints.leaves_one_of(is_sampleable):
            also = "" if params.structured is None else f", {params.structured.param}"
            raise ParameterError(
                "stop_token_ids" if params.allowed_token_ids is None else "allowed_token_ids",
                f"no token is left to begin with: allowed_token_ids, bad_words{also} and, while"
                " there are fewer than min_tokens, stop_token_ids and the model's end forbid every"
                " one; allow more ids",
            )

    def _check_encode(
        self, params: SamplingParams, encode: EncodeParams, start: SessionState | None
    ) -> None:
        if encode.mask_id is not None or not self.has_embeddings:
            message = "the model generates text; it fills no masks, and embeds with --embeddings"
            raise ParameterError("model", message)
        if start is not None or params.max_tokens or params.n > 1:
            message = "an embedding is of one prompt, without a session or generated tokens"
            raise ParameterError("max_tokens", message)

    def _check_ids(self, param: str, what: str, ids: Collection[int]) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self.num_ids:
            raise ParameterError(param, out_of_vocabulary(what, ids, self.num_ids))

    def _check_set(self, param: str, ids: Collection[int]) -> None:
        """The same for ids whose places mean nothing; where they are bad, the first stands for all.

        A set of all of them would keep the interpreter from other threads while it is made.
        """
        bad = next((each for each in ids if not 0 <= each < self.num_ids), None)
        if bad is not None:
            self._check_ids(param, param, {bad: None})

    def _check_allowed(self, allowed: Sequence[int]) -> None:
        name = "allowed_token_ids"
        self._check_set(name, allowed)
        if not allowed:
            raise ParameterError(name, f"{name} must hold an id; it is empty: leave it out")
        if self.sampleable_ids.isdisjoint(allowed):
            found = f"{allowed[0]} has none" + ", nor has any other" * (len(allowed) > 1)
            raise ParameterError(name, f"{name} must hold an id that has a token; {found}")


def _check_turn(params: SamplingParams) -> None:
    """Refuse what a session's turn cannot have: several choices, and scores of its whole prompt."""
    if params.n > 1:
        raise ParameterError("n", f"n must be 1 with a session; it is {params.n}: fork the session")
    if params.prompt_logprobs is not None:
        message = "prompt_logprobs is not available with a session: leave it out"
        raise ParameterError("prompt_logprobs", message)


def _check_at_most(param: str, value: int, limit: int, what: str) -> None:
    if value > limit:
        allowed = f"at least 1 and at most {limit} ({what})"
        raise ParameterError(param, f"{param} must be {allowed}; it is {shortened(value)}")


Prompt = str | Sequence[int]


class InputProcessor:
    """Tokenizes prompts and builds requests."""

    def __init__(
        self,
        tokenizer: BaseTokenizer,
        eos_token_ids: Sequence[int],
        limits: RequestLimits,
        policies: ContextPolicies,
        grammars: GrammarCompiler,
    ) -> None:
        """eos_token_ids: end-of-text ids of the model."""
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.limits = limits
        self.policies = policies
        self._grammars = grammars
        self._breakers = BreakerIds(tokenizer.written_bytes)
        self._last: tuple[SamplingParams, TokenConstraints, Grammar | None] | None = None

    def tokenize(self, prompt: Prompt) -> Sequence[int]:
        """A prompt's ids. Raises ParameterError for text that is not valid Unicode."""
        if not isinstance(prompt, str):
            return prompt
        try:
            return self.tokenizer.framed(self.tokenizer.encode(prompt))
        except TypeError:  # how the tokenizers library refuses text that is not valid Unicode
            raise ParameterError("prompt", "prompt has a lone surrogate (no character)") from None

    def build_request(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        start: SessionState | None,
        replayed: Sequence[int] = (),
    ) -> Request:
        """A checked request, which continues the session `start` if there is one.

        replayed: ids that a session's turn has generated before, elsewhere. Raises
        ParameterError or ContextPolicyError.
        """
        self.limits.check_prompt(prompt_ids, params, start)
        constraints, grammar = self._prepare(params)
        if start is not None:
            start = self.policies.settled(start, params)
        schedule = self.policies.schedule(prompt_ids, params, start)
        return Request.new(
            request_id,
            prompt_ids,
            params,
            self.tokenizer,
            constraints,
            start,
            schedule,
            grammar,
            replayed[: max(0, params.max_tokens - 1)],
        )

    def _prepare(self, params: SamplingParams) -> tuple[TokenConstraints, Grammar | None]:
        """What checked parameters say about ids; once for the prompts that are sent together."""
        last = self._last
        if last is not None and last[0] is params:
            return last[1:]
        self.limits.check_params(params)
        bad_words = encode_bad_words(params.bad_words, self.tokenizer)
        num_ids = self.tokenizer.num_ids
        constraints = TokenConstraints.of(params, num_ids, self.eos_token_ids, bad_words)
        structured = params.structured
        grammar = None if structured is None else self._grammars.compile(structured)
        self.limits.check_first_token(params, constraints, grammar)
        if params.has_dry:
            is_breaker = self._breakers.find(params.dry_sequence_breakers)
            rules = RepeatRules.of(params, is_breaker, self.policies.window)
            constraints = replace(constraints, repeats=rules)
        self._last = params, constraints, grammar
        return constraints, grammar
