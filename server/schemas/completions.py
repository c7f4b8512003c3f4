"""The body of POST /v1/completions."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from cottention.engine.sampling_params import SamplingParams
from cottention.server.http.body import shown
from cottention.server.http.errors import invalid
from cottention.server.schemas.base import validate
from cottention.server.schemas.field_types import PROMPTS, Prompts
from cottention.server.schemas.sampling import BOOLEAN, MAX_CHOICES, SamplingBody, ranged
from cottention.server.schemas.sessions import check_turn
from cottention.server.schemas.unsupported import COMPLETION, NeutralValues

MAX_TOKENS = (
    "a whole number from 1, or 0 with echo or prompt_logprobs, to score the prompt, or with"
    " return_state, to read it"
)


class CompletionRequest(SamplingBody):
    """Body of POST /v1/completions."""

    neutral: ClassVar[NeutralValues] = COMPLETION

    prompt: Prompts = Field(description=PROMPTS)
    max_tokens: int = ranged(16, MAX_TOKENS, 0)
    echo: bool = Field(False, description=BOOLEAN)
    logprobs: int | None = ranged(None, "a whole number from 0 to 20", 0, 20)
    best_of: int | None = ranged(None, "a whole number from n", 1, MAX_CHOICES)
    add_special_tokens: bool | None = Field(None, description=BOOLEAN)

    @property
    def adds_special_tokens(self) -> bool | None:
        """Whether special tokens are added to texts; None: only to the first that a state holds."""
        if self.add_special_tokens is None and not self.is_turn:
            return True
        return self.add_special_tokens

    @property
    def num_tried(self) -> int:
        """Choices generated for each prompt, of which the n best are returned."""
        return self.n if self.best_of is None else self.best_of

    def sampling_params(self, defaults: Mapping[str, Any], most: int) -> SamplingParams:
        """The engine's sampling parameters. Raises ParameterError.

        defaults: the model's own. most: what max_tokens is at most where the body has none.
        """
        max_tokens = self.max_tokens
        if "max_tokens" not in self.model_fields_set:
            max_tokens = min(defaults.get("max_tokens", max_tokens), most)
        return self.engine_params(
            defaults,
            n=self.num_tried,
            max_tokens=max_tokens,
            logprobs=0 if self.logprobs is None and self.num_tried > self.n else self.logprobs,
            prompt_logprobs=self._num_prompt_logprobs(),
        )

    def _num_prompt_logprobs(self) -> int | None:
        """An echoed prompt has log-probabilities if the generated text has."""
        wanted = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((each for each in wanted if each is not None), default=None)


def completion_request(body: Mapping[str, Any]) -> CompletionRequest:
    """Validate a body. Raises ApiError 400 naming the field."""
    has_past = any(body.get(name) is not None for name in ("session_id", "state"))
    if has_past and body.get("prompt") is None:
        body = {**body, "prompt": ""}
    request = validate(CompletionRequest, body)
    check_turn(request, len(request.prompt))
    _check_best_of(request)
    _check_max_tokens(request)
    choices = "n" if request.best_of is None else "best_of"
    param = choices if request.num_tried > MAX_CHOICES else "prompt"
    request.check_together(len(request.prompt) * request.num_tried, param)
    return request


def _check_max_tokens(request: CompletionRequest) -> None:
    """Generating nothing is only allowed if the response has something of the prompt."""
    can_be_0 = request.echo or request.prompt_logprobs is not None or request.return_state
    if request.max_tokens < (0 if can_be_0 else 1):
        message = f"max_tokens must be {MAX_TOKENS}; it is {shown(request.max_tokens)}"
        raise invalid("max_tokens", message)


def _check_best_of(request: CompletionRequest) -> None:
    if request.num_tried < request.n:
        message = f"best_of must be at least n ({request.n}); it is {shown(request.best_of)}"
        raise invalid("best_of", message)
    if request.num_tried > request.n and request.stream:
        message = "best_of greater than n is not possible in a stream: leave one of them out"
        raise invalid("best_of", message)
