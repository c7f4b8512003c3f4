"""Sampling parameters of a request, and their validation."""

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from cottention.engine.encoding import EncodeParams
from cottention.engine.errors import ParameterError
from cottention.engine.state.context_window import ContextPolicy
from cottention.engine.structured_output import StructuredOutput

GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy: dividing by them would overflow."""

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_SEED = 2**63 - 1
MAX_TOP_K = 2**31 - 1
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BAD_WORDS = 128
MAX_LOGPROB_IDS = 128
MAX_BREAKERS = 16
BREAKERS = ("\n", ":", '"', "*")
"""llama.cpp's default of dry_sequence_breakers."""

MAX_SHOWN = 40
"""Longer values are cut in messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request, under the names of OpenAI's and vLLM's APIs.

    max_tokens: maximum number of ids generated for each choice; 0 only computes the prompt.
    temperature: finite, from 0; 0 is greedy.
    top_p: in (0, 1]; 1 is off. top_k: from 1; 0 and −1 are off. min_p: in [0, 1]; 0 is off.
    seed: any int64; None is a random one.
    stop: up to 16 non-empty strings; the text ends before the first that appears.
    n: choices per prompt, from 1.
    ignore_eos: go on after the model's end-of-text id.
    presence_penalty, frequency_penalty: −2 to 2, subtracted from the logits of ids generated
    before: once, and once for each time. repetition_penalty: above 0; divides positive logits of
    ids in prompt and text, multiplies negative ones.
    dry_multiplier, dry_base, dry_allowed_length: a penalty on ids that would go on with a
    repetition of at least dry_allowed_length ids, as `sampling/dry.py` defines it; from 0, which is
    off, from 1, and from 1. dry_penalty_last_n: how many of the last ids are looked at; −1 and more
    than the model's window are the window, 0 is off. dry_sequence_breakers: up to 16 texts across
    which no repetition reaches.
    logit_bias: id → −100 to 100, added to its logit.
    min_tokens: ids generated before an end-of-text or stop id, or a stop string, may end the text.
    stop_token_ids: ids that end the text like the end-of-text id.
    include_stop_str_in_output: keep the stop string or stop id in the text.
    skip_special_tokens: leave special tokens out of the text.
    allowed_token_ids: the only ids that may be generated. bad_words: texts never generated.
    context_policy: "renew" or "exact", for sequences longer than the model's window; None: that of
    the session or the engine.
    structured: what the text has to be, from its first generated id on; None: any text. The text
    ends where that is complete, which `min_tokens` does not delay, so `ignore_eos` is refused.
    encode: what is asked of the prompt's hidden states in place of a continuation; encoders only.
    logprobs, prompt_logprobs: 0 to 20 most probable ids to report beside each id; None: no report.
    logprob_token_ids: up to 128 ids to report in place of the most probable, where there are
    `logprobs`.

    Raises ParameterError naming the field and what it allows.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = BREAKERS
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] | None = None
    context_policy: ContextPolicy | None = None
    structured: StructuredOutput | None = None
    encode: EncodeParams | None = None

    def __post_init__(self) -> None:
        _check_integer("max_tokens", self.max_tokens, 0, None)
        _check_integer("min_tokens", self.min_tokens, 0, self.max_tokens, "max_tokens")
        _check_integer("n", self.n, 1, None)
        _check_integer("top_k", self.top_k, -1, MAX_TOP_K)
        _check_number("temperature", self.temperature, 0.0, math.inf)
        _check_positive("top_p", self.top_p, 1.0)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_positive("repetition_penalty", self.repetition_penalty, math.inf)
        _check_number("dry_multiplier", self.dry_multiplier, 0.0, math.inf)
        _check_number("dry_base", self.dry_base, 1.0, math.inf)
        _check_integer("dry_allowed_length", self.dry_allowed_length, 1, MAX_TOP_K)
        _check_integer("dry_penalty_last_n", self.dry_penalty_last_n, -1, MAX_TOP_K)
        _check_strings("dry_sequence_breakers", self.dry_sequence_breakers, MAX_BREAKERS)
        _check_logprob_ids(self.logprob_token_ids, self.logprobs)
        if self.seed is not None:
            _check_integer("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        _check_strings("stop", self.stop, MAX_STOP_STRINGS)
        _check_strings("bad_words", self.bad_words, MAX_BAD_WORDS)
        _check_biases(self.logit_bias)
        _check_policy(self.context_policy)
        if self.ignore_eos and self.structured is not None:
            message = f"ignore_eos is not possible with {self.structured.param}: leave it out"
            raise ParameterError("ignore_eos", message)

    @property
    def has_penalty(self) -> bool:
        """Whether logits depend on earlier ids."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def has_dry(self) -> bool:
        """Whether repetitions are penalized."""
        return self.dry_multiplier > 0 and self.dry_penalty_last_n != 0

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable id is always taken."""
        return self.temperature < GREEDY_BELOW


def shortened(value: object) -> str:
    """A value as messages quote it."""
    if isinstance(value, int) and value.bit_length() > 128:  # Python writes no very long ones
        return "a number of more than 38 digits"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 4]} ..."


def out_of_vocabulary(what: str, ids: Collection[int], num_ids: int) -> str:
    """The message that names the first of `ids` beyond the vocabulary. what: the ids, in plural."""
    place, found = next((i, each) for i, each in enumerate(ids) if not 0 <= each < num_ids)
    where = "" if isinstance(ids, Mapping) else f" (at index {place})"
    return f"{what} must be from 0 to {num_ids - 1}; {shortened(found)}{where} is not"


def _check_integer(
    name: str, value: Any, low: int, high: int | None, high_name: str | None = None
) -> None:
    """high_name: the parameter that `high` is the value of."""
    allowed = f"a whole number from {low}" + ("" if high is None else f" to {high}")
    allowed += f" ({high_name})" if high_name else ""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        raise ParameterError(name, f"{name} must be {allowed}; it is {shortened(value)}")


def _is_number(value: Any, high: float) -> bool:
    """Whether `value` is a finite number of at most `high`; false for NaN, exact for any int."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and -sys.float_info.max <= value <= min(high, sys.float_info.max)


def _check_number(name: str, value: Any, low: float, high: float, which: str = "") -> None:
    """which: the entry of the parameter that `value` is, as messages name it."""
    if not _is_number(value, high) or value < low:
        allowed = f"a finite number from {low:g}" + ("" if high == math.inf else f" to {high:g}")
        message = f"{which or name} must be {allowed}; it is {shortened(value)}"
        raise ParameterError(name, message)


def _check_positive(name: str, value: Any, high: float) -> None:
    if not _is_number(value, high) or value <= 0:
        allowed = "a finite number greater than 0"
        allowed += "" if high == math.inf else f", up to {high:g}"
        raise ParameterError(name, f"{name} must be {allowed}; it is {shortened(value)}")


def _check_strings(name: str, strings: Sequence[str], limit: int) -> None:
    if len(strings) > limit:
        raise ParameterError(name, f"{name} takes at most {limit} strings; it has {len(strings)}")
    for place, text in enumerate(strings):
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
            allowed = f"each string of {name} must have 1 to {MAX_STOP_LENGTH} characters"
            found = f"at index {place} is {shortened(text)}"
            found += f", of {len(text)} characters" if isinstance(text, str) else ""
            raise ParameterError(name, f"{allowed}; {found}")


def _check_logprob_ids(ids: Sequence[int] | None, logprobs: int | None) -> None:
    name = "logprob_token_ids"
    if ids is None:
        return
    if logprobs is None:
        raise ParameterError(name, f"{name} is only allowed with logprobs: leave it out")
    if not 1 <= len(ids) <= MAX_LOGPROB_IDS:
        message = f"{name} must have 1 to {MAX_LOGPROB_IDS} ids; it has {len(ids)}"
        raise ParameterError(name, message)


def _check_policy(policy: str | None) -> None:
    if policy is not None and policy not in get_args(ContextPolicy):
        allowed = " or ".join(f'"{each}"' for each in get_args(ContextPolicy))
        raise ParameterError(
            "context_policy", f"context_policy must be {allowed}; it is {shortened(policy)}"
        )


def _check_biases(logit_bias: Mapping[int, float]) -> None:
    if len(logit_bias) > MAX_BIASES:
        raise ParameterError(
            "logit_bias", f"logit_bias takes at most {MAX_BIASES} ids; it has {len(logit_bias)}"
        )
    for token_id, bias in logit_bias.items():
        _check_number("logit_bias", bias, -100.0, 100.0, f"logit_bias of id {shortened(token_id)}")
