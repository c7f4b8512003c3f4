"""The context policy of a request: which one applies, and which requests it refuses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from cottention.engine.errors import ParameterError
from cottention.engine.models.config import ModelConfig
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.state.context_window import ContextPolicy, ContextSchedule, context_schedules
from cottention.engine.state.session_state import SessionState

MAX_HELD = 2**40
"""Most tokens of a sequence: a thousand per second for thirty years. Up to here float64 tells
neighbouring positions apart, and rotary angles computed in it are within 2⁻¹² of the exact ones."""

KEPT_IDS = 1024
"""How many of its last ids a session keeps where the model's window is not known: a later turn of a
chat is compared with them."""

_NO_SPARE_ROWS = "this server runs under --context-policy exact and has no spare rows"
_NO_WINDOW = "this model's context window is not known"


@dataclass(frozen=True, slots=True)
class ContextPolicies:
    """The context policies of an engine.

    default: for requests without one; "exact" as the default means that the pool has no spare rows,
    which "renew" needs. window: number of tokens up to which all policies are equal, and how many
    of its last ids a session keeps; where the model's window is not known, of which there is only
    "exact", KEPT_IDS. max_exact_length: most tokens of a sequence under "exact", if
    there is a limit. context_schedules: by policy.
    """

    default: ContextPolicy
    window: int
    max_exact_length: int | None
    context_schedules: Mapping[ContextPolicy, ContextSchedule]

    @classmethod
    def of(cls, config: ModelConfig, default: ContextPolicy) -> Self:
        """The policies of an engine with this model."""
        window = config.window
        schedules = context_schedules(window)
        return cls(default, window or KEPT_IDS, config.max_exact_length, schedules)

    def new_session(self, policy: ContextPolicy | None) -> SessionState:
        """An empty session; None is the default policy. Raises ParameterError."""
        state = SessionState(context_policy=policy or self.default)
        self.schedule((), SamplingParams(max_tokens=0), state)
        return state

    def check_goes_on(self, state: SessionState) -> None:
        """Raise ParameterError for a session of which no turn can run on this engine.

        A session of at most `window` tokens passes, because its policy can still change.
        """
        if state.num_tokens > self.window:
            self.schedule((), SamplingParams(max_tokens=0), state)

    def num_reread(self, start: SessionState, num_new: int) -> int:
        """Ids of a session that a turn with a prompt of `num_new` ids reads besides that prompt.

        Those that wait outside the rows and, where the rows are not of the context in which the
        prompt ends, all that this context is computed from.
        """
        stop = start.num_tokens + num_new
        if not stop:
            return 0
        begins = self.context_schedules[start.context_policy].start
        begin = begins(stop - 1)
        goes_on = start.position > 0 and begins(start.position - 1) == begin
        num_computed = stop - (start.position if goes_on else begin)
        return max(len(start.pending), num_computed - num_new)

    def settled(self, start: SessionState, params: SamplingParams) -> SessionState:
        """The session under the policy that the request asks for. Raises ContextPolicyError."""
        return start.under(params.context_policy, self.window)

    def schedule(
        self, prompt_ids: Sequence[int], params: SamplingParams, start: SessionState | None
    ) -> ContextSchedule:
        """The schedule of a request; `start` comes from `settled`. Raises ParameterError."""
        num_tokens = len(prompt_ids) + (0 if start is None else start.num_tokens)
        _check_sequence_length(num_tokens, params.max_tokens)
        policy = params.context_policy or self.default if start is None else start.context_policy
        if policy == "renew" and self.default == "exact":
            reason = 'context_policy must be "exact"'
            if start is not None:
                reason = 'the session has context_policy "renew", which is not available'
                if start.num_tokens <= self.window:
                    reason += ' (a turn with "exact" would change it)'
            why = _NO_SPARE_ROWS if "renew" in self.context_schedules else _NO_WINDOW
            raise ParameterError("context_policy", f"{reason}: {why}")
        if policy == "exact" and self.max_exact_length is not None:
            _check_exact_length(num_tokens, params.max_tokens, self.max_exact_length)
        return self.context_schedules[policy]


def _check_sequence_length(num_tokens: int, max_tokens: int) -> None:
    if num_tokens + max_tokens > MAX_HELD:
        raise ParameterError(
            "prompt" if num_tokens > MAX_HELD else "max_tokens",
            f"a sequence holds at most {MAX_HELD} tokens; here are {num_tokens} and max_tokens is"
            f" {max_tokens}",
        )


def _check_exact_length(num_tokens: int, max_tokens: int, limit: int) -> None:
    """Beyond the limit the attention's weights change sign, and the output is meaningless."""
    if num_tokens + max_tokens > limit:
        raise ParameterError(
            "prompt" if num_tokens > limit else "max_tokens",
            f'under context_policy "exact" this model takes at most {limit} tokens; here are'
            f" {num_tokens} and max_tokens is {max_tokens}: ask for fewer, or for context_policy"
            ' "renew"',
        )
