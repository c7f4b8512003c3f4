"""What the engine returns: outputs of a step, finished completions, statistics."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Self

from cottention.engine.encoding import Encoded
from cottention.engine.errors import RequestFailedError
from cottention.engine.state.prefix_cache import CacheStats

if TYPE_CHECKING:  # its rows are tensors; reading outputs does not need torch
    from cottention.engine.state.session_state import SessionState


class FinishReason(StrEnum):
    """Why a choice ended; the values are those of the OpenAI API where it has them."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    TIMEOUT = "timeout"
    SLOW_READER = "slow_reader"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of an id: log-softmax of the model's logits in float32, before all settings.

    rank: 1 + the number of more probable ids.
    top: (id, logprob) of the most probable ids, as many as requested, in descending order.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)  # one for each token: a frozen one takes three times as long to make
class Output:
    """What one step added to one choice of a request. Nothing changes it.

    text: characters that are final; they may belong to earlier ids, and may be none.
    token_ids: ids sampled in this step, the end-of-text id included.
    finish_reason: set in a choice's last output and in no other.
    error: message, where finish_reason is ERROR.
    stop_reason: the stop string or stop id that ended the choice; None for the end-of-text id.
    logprobs: one for each of token_ids, where requested.
    state: the session's state after the turn, in the last output, unless the turn was cut.
    context_start: index of the oldest token that the next one would depend on.
    encoded: what was asked of the prompt's hidden states, in an encoder's only output.

    Per-request fields. started: when the request first had slots, by time.monotonic. Sent only with
    choice 0: prompt_logprobs, one for each prompt id, None for the first, in its first output;
    num_cached, prompt ids restored from the prefix cache, in its last output.
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
    encoded: Encoded | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start, and gauges.

    num_running, num_waiting (for slots) and num_paused count requests. num_paused_states,
    max_paused_states: states parked on the host, of requests that are paused or were resumed and
    wait for slots. num_preempted_states: the same of requests that gave their slots to another
    client; num_preemptions: how often that happened. num_finished: choices by finish reason.
    num_faults: requests that an exception ended. num_undrawn: choices for which no token could be
    sampled, because no logit was finite or every token was forbidden.
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
    num_preempted_states: int = 0
    num_preemptions: int = 0
    prefix_cache: CacheStats = CacheStats()


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished choice of a prompt: its outputs joined."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason

    @classmethod
    def of(cls, outputs: Sequence[Output]) -> Self:
        """Join all outputs of a choice. Raises RequestFailedError where it ended with an error."""
        last = outputs[-1]
        if last.finish_reason is FinishReason.ERROR or last.finish_reason is None:
            raise RequestFailedError(last.error or "the request did not finish")
        ids = tuple(token_id for output in outputs for token_id in output.token_ids)
        return cls("".join(output.text for output in outputs), ids, last.finish_reason)
