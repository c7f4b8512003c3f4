"""From what a caller says to a request: text becomes ids, and what cannot be is refused.

Owns the order of the checks. Does not know queues, rows or steps; may be called from any thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cottention.engine.errors import ParameterError
from cottention.engine.limits import Limits
from cottention.engine.params import SamplingParams
from cottention.engine.policies import Policies
from cottention.engine.request import Request
from cottention.engine.session_state import SessionState
from cottention.engine.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Intake:
    """Makes requests. eos_token_ids: the model's own ends."""

    tokenizer: Tokenizer
    eos_token_ids: Sequence[int]
    limits: Limits
    policies: Policies

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
        self.limits.check_any_is_left(params, request.choices[0].barred_ids())
        return request
