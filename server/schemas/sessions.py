"""What requests about sessions may hold, and what a turn of one cannot be. Knows no answers."""

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from cottention.engine.state.context_window import ContextPolicy
from cottention.server.http.body import is_text, shown
from cottention.server.http.errors import invalid
from cottention.server.schemas.base import Body, checked
from cottention.server.schemas.field_types import Prompt, check_text, told, wrong_type
from cottention.server.schemas.sampling import CONFLICT, POLICY, OnConflict, SamplingBody, ranged

MAX_METADATA, MAX_KEY, MAX_VALUE = 16, 64, 512
MAX_TTL_SECONDS = 10 * 365 * 86_400
MAX_FORKS = 1024

PROMPT = "text or a list of token ids"
METADATA = (
    f"an object of up to {MAX_METADATA} strings of up to {MAX_VALUE} characters, with names of"
    f" up to {MAX_KEY}"
)
TTL = f"a number of seconds above 0, up to {MAX_TTL_SECONDS}"
FORKS = f"a whole number from 1 to {MAX_FORKS}"

WITHOUT_SESSION = {"on_conflict": "error", "on_cancel": "keep", "on_disconnect": "cancel"}
WITH_SESSION = {
    "n": (1,),
    "best_of": (None, 1),
    "echo": (False,),
    "prompt_logprobs": (None,),
    "truncate_prompt_tokens": (None,),
}
"""What a turn leaves alone: a session has one future, and its past is not read again."""


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        check_text("prompt", value)
        return value
    if not isinstance(value, list):
        raise wrong_type()
    for place, each in enumerate(value):
        if type(each) is not int:
            raise told(f"prompt must be {PROMPT}; at index {place} is {shown(each)}")
    return value


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MAX_METADATA:
        raise told(f"metadata must be {METADATA}")
    for name, text in value.items():
        is_fit = isinstance(text, str) and len(name) <= MAX_KEY and len(text) <= MAX_VALUE
        if not (is_fit and is_text(name) and is_text(text)):
            raise told(f"metadata must be {METADATA}; {shown(name)} is not")
    return value


OnePrompt = Annotated[Prompt, PlainValidator(_prompt, json_schema_input_type=str | list[int])]
Metadata = Annotated[
    dict[str, str], PlainValidator(_metadata, json_schema_input_type=dict[str, str])
]


class KeptBody(Body):
    """How a new session is kept."""

    metadata: Metadata = Field({}, description=METADATA)
    ttl_seconds: float | None = ranged(None, TTL, 0, MAX_TTL_SECONDS)


class SessionRequest(KeptBody):
    """Body of POST /v1/sessions."""

    prompt: OnePrompt = Field("", description=PROMPT)
    context_policy: ContextPolicy | None = Field(None, description=POLICY)


class AppendRequest(Body):
    """Body of POST /v1/sessions/ID/append."""

    prompt: OnePrompt = Field(description=PROMPT)
    on_conflict: OnConflict = Field("error", description=CONFLICT)


class ForkRequest(Body):
    """Body of POST /v1/sessions/ID/fork."""

    n: int = ranged(1, FORKS, 1, MAX_FORKS)
    on_conflict: OnConflict = Field("error", description=CONFLICT)


def kept_body(body: Mapping[str, Any]) -> KeptBody:
    """Check how an imported session is to be kept. Raises ApiError 400 naming the field."""
    request = checked(KeptBody, body)
    _check_ttl(request.ttl_seconds)
    return request


def session_request(body: Mapping[str, Any]) -> SessionRequest:
    """Check a body. Raises ApiError 400 naming the field."""
    request = checked(SessionRequest, body)
    _check_ttl(request.ttl_seconds)
    return request


def fork_request(body: Mapping[str, Any]) -> ForkRequest:
    """Check a body. Raises ApiError 400 naming the field."""
    request = checked(ForkRequest, body)
    if not 1 <= request.n <= MAX_FORKS:
        raise invalid("n", f"n must be {FORKS}; it is {request.n}")
    return request


def check_turn(request: SamplingBody, num_prompts: int) -> None:
    """What a request may ask for with a session, and without one. Raises ApiError."""
    if request.session_id is None:
        for name, neutral in WITHOUT_SESSION.items():
            if getattr(request, name) != neutral:
                raise invalid(name, f"{name} is only allowed with session_id")
        return
    if num_prompts != 1:
        raise invalid("prompt", f"prompt must be {PROMPT} with session_id; here are {num_prompts}")
    for name, allowed in WITH_SESSION.items():
        if getattr(request, name, allowed[0]) not in allowed:
            raise invalid(name, f"{name} is not possible with session_id: leave it out")


def _check_ttl(seconds: float | None) -> None:
    if seconds is not None and not (math.isfinite(seconds) and 0 < seconds <= MAX_TTL_SECONDS):
        raise invalid("ttl_seconds", f"ttl_seconds must be {TTL}; it is {shown(seconds)}")
