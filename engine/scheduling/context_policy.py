"""Under which context policy a request runs, and which it cannot have here.

Owns the refusals. Does not know what a policy does to rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from cottention.engine.errors import ParameterError
from cottention.engine.models.config import ModelConfig
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.state.context_window import ContextPolicy, ContextSchedule, context_schedules
from cottention.engine.state.session_state import SessionState

MAX_HELD = 2**40
"""Tokens of a sequence: a thousand a second for thirty years. Up to here float64 tells every
position from the next, and rotary angles taken in it are within 2⁻¹² of the true ones."""

_NO_SPARES = "this server was started with --context-policy exact and has no spare rows"


@dataclass(frozen=True, slots=True)
class ContextPolicies:
    """default: of requests that do not say, and whether there are spare rows: only for renewal.

    window: tokens up to which all policies are the same, and how many of its ids a session keeps.
    max_exact_length: tokens up to which a sequence may grow without renewal, if not for ever.
    """

    default: ContextPolicy
    window: int
    max_exact_length: int | None
    context_schedules: Mapping[ContextPolicy, ContextSchedule]

    @classmethod
    def of(cls, config: ModelConfig, default: ContextPolicy) -> Self:
        """Those of an engine with this model."""
        return cls(
            default, config.window, config.max_exact_length, context_schedules(config.window)
        )

    def new_session(self, policy: ContextPolicy | None) -> SessionState:
        """One that holds nothing; None: under the default. Raises ParameterError."""
        state = SessionState(context_policy=policy or self.default)
        self.grid((), SamplingParams(max_tokens=0), state)
        return state

    def check_goes_on(self, state: SessionState) -> None:
        """Raise ParameterError for a session of which no turn can run here, whatever it asks for.

        One that holds no more than `window` may still change its policy.
        """
        if state.num_tokens > self.window:
            self.grid((), SamplingParams(max_tokens=0), state)

    def settled(self, start: SessionState, params: SamplingParams) -> SessionState:
        """A session as the request goes on with it. ContextPolicyError."""
        return start.under(params.context_policy, self.window)

    def grid(
        self, prompt_ids: Sequence[int], params: SamplingParams, start: SessionState | None
    ) -> ContextSchedule:
        """Of a request, whose session is settled. Raises ParameterError."""
        num = len(prompt_ids) + (0 if start is None else start.num_tokens)
        _check_age(num, params.max_tokens)
        policy = params.context_policy or self.default if start is None else start.context_policy
        if policy == "renew" and self.default == "exact":
            wish = 'context_policy must be "exact"'
            if start is not None:
                wish = 'the session has context_policy "renew", which is not to be had'
                if start.num_tokens <= self.window:
                    wish += ' (a turn with "exact" would change it)'
            raise ParameterError("context_policy", f"{wish}: {_NO_SPARES}")
        if policy == "exact" and self.max_exact_length is not None:
            _check_length(num, params.max_tokens, self.max_exact_length)
        return self.context_schedules[policy]


def _check_age(num: int, max_tokens: int) -> None:
    if num + max_tokens > MAX_HELD:
        raise ParameterError(
            "prompt" if num > MAX_HELD else "max_tokens",
            f"a sequence holds at most {MAX_HELD} tokens; here are {num} and max_tokens is"
            f" {max_tokens}",
        )


def _check_length(num: int, max_tokens: int, most: int) -> None:
    """Beyond it the model's weights change sign, and nothing it says means anything."""
    if num + max_tokens > most:
        param = "prompt" if num > most else "max_tokens"
        raise ParameterError(
            param,
            f'under context_policy "exact" this model takes at most {most} tokens; here are {num}'
            f' and max_tokens is {max_tokens}: ask for fewer, or for context_policy "renew"',
        )
