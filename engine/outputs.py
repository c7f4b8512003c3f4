"""What the engine says: a piece of one choice per step, and its figures. Knows no transport."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Self

from cottention.engine.errors import RequestFailedError
from cottention.engine.state.prefix_cache import CacheStats

if TYPE_CHECKING:  # its rows are tensors, and whoever reads outputs need not load torch
    from cottention.engine.state.session_state import SessionState


class FinishReason(StrEnum):
    """Why a choice ended; the values are those of the OpenAI API where it has them."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    UNREAD = "unread"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model itself held an id: its log-softmax in float32, before all settings.

    rank: 1 + how many ids were held likelier.
    top: (id, logprob) of as many of the likeliest ids as were asked for, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class SampledToken(NamedTuple):
    """An id, and how likely the model held it where that was asked for."""

    token_id: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class Output:
    """What one step added to one choice of a request.

    text: characters that are certain now; they may belong to earlier ids, and may be none.
    token_ids: ids sampled in this step, the end-of-text id included.
    finish_reason: set in a choice's last output, exactly once.
    stop_reason: the stop string or stop id that ended it; None for the model's own end.
    logprobs: one for each of token_ids, where they were asked for.
    prompt_logprobs: of the whole prompt, None for its first id; in choice 0's first output.
    error: what went wrong, where finish_reason is ERROR.
    state: of a session after its turn, in the last output of one that was not cut.
    num_cached: ids of the prompt that were not read again, in the last output of choice 0.
    context_start: index of the oldest token that the next one would be drawn with.
    started: when the request had its slots, by time.monotonic.
    """

    request_id: str
    choice: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    state: "SessionState | None" = None
    num_cached: int = 0
    context_start: int = 0
    started: float | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start and gauges of this moment.

    num_running, num_waiting (for slots) and num_paused (for their readers) count requests;
    num_paused_states, max_paused_states: on the host, of those that pause or wait to go on.
    num_finished counts choices by how they ended. num_faults: requests that a fault ended;
    num_undrawn: choices without a token that could be drawn, since no logit was finite or every
    token forbidden.
    """

    num_running: int
    num_waiting: int
    num_paused: int
    num_paused_states: int
    max_paused_states: int
    num_finished: dict[FinishReason, int]
    num_prompt_tokens: int
    num_generated_tokens: int
    num_steps: int
    num_faults: int
    num_undrawn: int
    num_slots: int
    num_free_slots: int
    pool_bytes: int
    bytes_per_slot: int
    prefix_cache: CacheStats = CacheStats()


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished choice of a prompt: what its outputs came to."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason

    @classmethod
    def of(cls, outputs: Sequence[Output]) -> Self:
        """All outputs of one choice, the last one included. Raises RequestFailedError."""
        last = outputs[-1]
        if last.finish_reason is FinishReason.ERROR or last.finish_reason is None:
            raise RequestFailedError(last.error or "the request did not finish")
        ids = tuple(token_id for output in outputs for token_id in output.token_ids)
        return cls("".join(output.text for output in outputs), ids, last.finish_reason)
