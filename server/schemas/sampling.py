"""Fields that completions and chats share: sampling, streaming, sessions and scheduling."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Literal

from pydantic import Field

from cottention.engine.sampling_params import BREAKERS, SamplingParams
from cottention.engine.state.context_window import ContextPolicy
from cottention.server.http.body import shown
from cottention.server.http.errors import invalid
from cottention.server.schemas.base import RequestModel
from cottention.server.schemas.field_types import (
    BIASES,
    MAX_SHORT,
    Biases,
    DistinctIds,
    ListedStrings,
    Name,
    ShortText,
    Strings,
)
from cottention.server.schemas.structured import StructuredFields
from cottention.server.schemas.unsupported import STREAM_OPTIONS, NeutralValues

MAX_CHOICES = 128
"""Maximum number of choices of one request: its prompts times n, or times best_of."""

MAX_PRIORITY = 2**63 - 1

BOOLEAN = "true or false"
PRIORITY = "a whole number of 64 bits"
NAME = "up to 128 letters, digits, ., _, : and -"
IDS = "a list of token ids"
SESSION = f"a string of up to {MAX_SHORT} characters, an id from /v1/sessions"
MODEL = f"a string of up to {MAX_SHORT} characters, an id from /v1/models"
STATE = "the `state` of an answer that was asked for with return_state: a snapshot in base64"
SALT = f"a string of up to {MAX_SHORT} characters"
CONFLICT = '"error" or "wait"'
TIMEOUT = "a number of seconds greater than 0"
LAST_N = "a whole number from 0, which is off, or -1 for the model's window"
POLICY = '"renew" or "exact"'
TRUNCATION = "a whole number from 1, or -1 for the model's trained length"


OnConflict = Literal["error", "wait"]
OnCancel = Literal["keep", "rollback"]
OnDisconnect = Literal["cancel", "continue"]


def ranged(default: Any, description: str, low: float, high: float | None = None) -> Any:
    """A field whose range is published in its schema; the engine checks it."""
    bounds: dict[str, Any] = {"minimum": low} | ({} if high is None else {"maximum": high})
    return Field(default, description=description, json_schema_extra=bounds)


class StreamOptions(RequestModel):
    """Usage statistics in a stream."""

    neutral: ClassVar[NeutralValues] = STREAM_OPTIONS

    include_usage: bool = Field(False, description=BOOLEAN)
    continuous_usage_stats: bool = Field(False, description=BOOLEAN)


class CacheOptions(RequestModel):
    """How a request uses the prefix cache."""

    read: bool = Field(True, description=BOOLEAN)
    write: bool = Field(True, description=BOOLEAN)


class SamplingBody(StructuredFields):
    """Fields of completions and of chats."""

    nested: ClassVar[Mapping[str, type[RequestModel]]] = {
        "stream_options": StreamOptions,
        "cache": CacheOptions,
    }

    model: ShortText | None = Field(None, description=MODEL)
    temperature: float = ranged(1.0, "a finite number from 0", 0)
    top_p: float = ranged(1.0, "a number greater than 0 and at most 1", 0, 1)
    top_k: int = ranged(0, "a whole number from 1, or 0 or -1 for all tokens", -1, 2**31 - 1)
    min_p: float = ranged(0.0, "a number from 0 to 1", 0, 1)
    seed: int | None = ranged(None, "a whole number of 64 bits", -(2**63), 2**63 - 1)
    n: int = ranged(1, "a whole number from 1", 1, MAX_CHOICES)
    stop: Strings = Field((), description="a string or a list of up to 16 strings")
    stop_token_ids: DistinctIds = Field((), description=IDS)
    include_stop_str_in_output: bool = Field(False, description=BOOLEAN)
    min_tokens: int = ranged(0, "a whole number from 0 to max_tokens", 0)
    ignore_eos: bool = Field(False, description=BOOLEAN)
    presence_penalty: float = ranged(0.0, "a number from -2 to 2", -2, 2)
    frequency_penalty: float = ranged(0.0, "a number from -2 to 2", -2, 2)
    repetition_penalty: float = ranged(1.0, "a finite number greater than 0", 0)
    dry_multiplier: float = ranged(0.0, "a finite number from 0, which is off", 0)
    dry_base: float = ranged(1.75, "a finite number from 1", 1)
    dry_allowed_length: int = ranged(2, "a whole number from 1", 1, 2**31 - 1)
    dry_penalty_last_n: int = ranged(-1, LAST_N, -1, 2**31 - 1)
    dry_sequence_breakers: ListedStrings = Field(BREAKERS, description="a list of strings")
    logit_bias: Biases = Field({}, description=BIASES)
    allowed_token_ids: DistinctIds | None = Field(None, description=IDS)
    bad_words: ListedStrings = Field((), description="a list of strings")
    skip_special_tokens: bool = Field(True, description=BOOLEAN)
    context_policy: ContextPolicy | None = Field(None, description=POLICY)
    truncate_prompt_tokens: int | None = ranged(None, TRUNCATION, -1)
    truncation_side: Literal["left", "right"] = Field("left", description='"left" or "right"')
    prompt_logprobs: int | None = ranged(None, "a whole number from 0 to 20", 0, 20)
    logprob_token_ids: DistinctIds | None = Field(None, description=IDS)
    return_token_ids: bool = Field(False, description=BOOLEAN)
    return_tokens_as_token_ids: bool = Field(False, description=BOOLEAN)
    stream: bool = Field(False, description=BOOLEAN)
    stream_options: StreamOptions | None = Field(None, description="an object")
    timings: bool = Field(False, description=BOOLEAN)
    timings_per_token: bool = Field(False, description=BOOLEAN)
    priority: int = ranged(0, PRIORITY, -MAX_PRIORITY, MAX_PRIORITY)
    timeout: float | None = ranged(None, TIMEOUT, 0)
    cache_salt: ShortText | None = Field(None, description=SALT)
    cache: CacheOptions | None = Field(None, description="an object")
    request_id: Name | None = Field(None, description=NAME)
    session_id: ShortText | None = Field(None, description=SESSION)
    on_conflict: OnConflict = Field("error", description=CONFLICT)
    on_cancel: OnCancel = Field("keep", description='"keep" or "rollback"')
    on_disconnect: OnDisconnect = Field("cancel", description='"cancel" or "continue"')
    state: str | None = Field(None, description=STATE)
    return_state: bool = Field(False, description=BOOLEAN)

    @property
    def is_turn(self) -> bool:
        """Whether it goes on from a state, or its answer leaves one: of a session or in hand."""
        return self.session_id is not None or self.state is not None or self.return_state

    def engine_params(self, defaults: Mapping[str, Any], **more: Any) -> SamplingParams:
        """The engine's sampling parameters: the fields of the same names, and `more`.

        defaults: the model's own values of fields that the body does not have.
        Raises ParameterError.
        """
        given = {name: getattr(self, name) for name in _ENGINE_FIELDS}
        own = {name: defaults[name] for name in defaults.keys() - self.model_fields_set}
        return SamplingParams(**given | own | {"structured": self.structured} | more)

    def num_alternatives(self, num_top: int | None) -> int | None:
        """Alternatives beside each token: the named ids, or else the `num_top` most probable.

        None where there are no log-probabilities.
        """
        named = self.logprob_token_ids
        return num_top if named is None or num_top is None else len(named)

    def check_together(self, num_choices: int, choices_param: str) -> None:
        """Check fields that depend on each other. Raises ApiError.

        choices_param: the field that is named if there are too many choices.
        """
        if num_choices > MAX_CHOICES:
            found = f"it is {shown(num_choices)}"
            message = f"prompts times n must be at most {MAX_CHOICES}; {found}: ask for fewer"
            raise invalid(choices_param, message)
        if self.stream_options and not self.stream:
            message = "stream_options is only allowed if stream is true: leave it out"
            raise invalid("stream_options", message)
        if self.prompt_logprobs is not None and self.stream:
            message = "prompt_logprobs is not supported in a stream: leave one of them out"
            raise invalid("prompt_logprobs", message)
        length = self.truncate_prompt_tokens
        if length is not None and (length < -1 or length == 0):
            message = f"truncate_prompt_tokens must be {TRUNCATION}; it is {shown(length)}"
            raise invalid("truncate_prompt_tokens", message)
        if self.timeout is not None and not 0 < self.timeout < math.inf:  # false for NaN
            raise invalid("timeout", f"timeout must be {TIMEOUT}; it is {shown(self.timeout)}")
        if abs(self.priority) > MAX_PRIORITY:
            raise invalid("priority", f"priority must be {PRIORITY}; it is {shown(self.priority)}")


_ENGINE_FIELDS = [
    item.name for item in fields(SamplingParams) if item.name in SamplingBody.model_fields
]
