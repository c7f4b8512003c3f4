"""Bodies of requests about sessions, and the fields that a turn of a session cannot have."""

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from cottention.engine.state.context_window import ContextPolicy
from cottention.server.http.body import shown
from cottention.server.http.errors import invalid
from cottention.server.schemas.base import RequestModel, validate
from cottention.server.schemas.field_types import Prompt, check_text, field_error, wrong_type
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
"""Values that a turn may have, of a session or with a state in hand: it has one choice, and the
past is not processed again."""

STATE_FIELDS = ("state", "return_state")


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        check_text("prompt", value)
        return value
    if not isinstance(value, list):
        raise wrong_type()
    for place, each in enumerate(value):
        if type(each) is not int:
            raise field_error(f"prompt must be {PROMPT}; at index {place} is {shown(each)}")
    return value


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise field_error(f"metadata must be {METADATA}; it is {shown(value)}")
    if len(value) > MAX_METADATA:
        raise field_error(f"metadata must be {METADATA}; it has {len(value)}")
    for name, text in value.items():
        check_text("a name in metadata", name)
        if len(name) > MAX_KEY:
            found = f"the name {shown(name)} has {len(name)} characters"
        elif not isinstance(text, str):
            found = f"{shown(name)} is {shown(text)}"
        elif len(text) > MAX_VALUE:
            found = f"{shown(name)} has {len(text)} characters"
        else:
            check_text(f"metadata of {shown(name)}", text)
            continue
        raise field_error(f"metadata must be {METADATA}; {found}")
    return value


OnePrompt = Annotated[Prompt, PlainValidator(_prompt, json_schema_input_type=str | list[int])]
Metadata = Annotated[
    dict[str, str],
    PlainValidator(
        _metadata,
        json_schema_input_type=Annotated[
            dict[
                Annotated[str, Field(max_length=MAX_KEY)],
                Annotated[str, Field(max_length=MAX_VALUE)],
            ],
            Field(max_length=MAX_METADATA),
        ],
    ),
]


class SessionOptions(RequestModel):
    """Metadata and lifetime of a new session."""

    metadata: Metadata = Field({}, description=METADATA)
    ttl_seconds: float | None = ranged(None, TTL, 0, MAX_TTL_SECONDS)


class SessionRequest(SessionOptions):
    """Body of POST /v1/sessions."""

    prompt: OnePrompt = Field("", description=PROMPT)
    context_policy: ContextPolicy | None = Field(None, description=POLICY)


class AppendRequest(RequestModel):
    """Body of POST /v1/sessions/ID/append."""

    prompt: OnePrompt = Field(description=PROMPT)
    on_conflict: OnConflict = Field("error", description=CONFLICT)


class ForkRequest(RequestModel):
    """Body of POST /v1/sessions/ID/fork."""

    n: int = ranged(1, FORKS, 1, MAX_FORKS)
    metadata: Metadata | None = Field(
        None, description=f"{METADATA}; unless given that of the session"
    )
    on_conflict: OnConflict = Field("error", description=CONFLICT)


def session_options(body: Mapping[str, Any]) -> SessionOptions:
    """Validate the options of an imported session. Raises ApiError 400 naming the field."""
    request = validate(SessionOptions, body)
    _check_ttl(request.ttl_seconds)
    return request


def session_request(body: Mapping[str, Any]) -> SessionRequest:
    """Validate a body. Raises ApiError 400 naming the field."""
    request = validate(SessionRequest, body)
    _check_ttl(request.ttl_seconds)
    return request


def fork_request(body: Mapping[str, Any]) -> ForkRequest:
    """Validate a body. Raises ApiError 400 naming the field."""
    request = validate(ForkRequest, body)
    if not 1 <= request.n <= MAX_FORKS:
        raise invalid("n", f"n must be {FORKS}; it is {shown(request.n)}")
    return request


def check_turn(request: SamplingBody, num_prompts: int) -> None:
    """Check fields that are only allowed with a session or a state, or only without.

    Raises ApiError.
    """
    asked = [name for name in STATE_FIELDS if getattr(request, name) not in (None, False)]
    if request.session_id is None:
        for name, neutral in WITHOUT_SESSION.items():
            if getattr(request, name) != neutral:
                raise invalid(name, f"{name} is only allowed with session_id: leave it out")
    elif asked:
        [name, *_] = asked
        where = "GET /v1/sessions/ID/snapshot and POST /v1/sessions/import have the session's"
        message = f"{name} is not possible with session_id: leave one of them out; {where}"
        raise invalid(name, message)
    if not request.is_turn:
        return
    why = "session_id" if request.session_id is not None else asked[0]
    if num_prompts != 1:
        found = f"there are {num_prompts} prompts: send one"
        raise invalid("prompt", f"prompt must be {PROMPT} with {why}; {found}")
    for name, allowed in WITH_SESSION.items():
        value = getattr(request, name, allowed[0])
        if value not in allowed:
            found = f"it is {shown(value)}: leave it out"
            raise invalid(name, f"{name} is not possible with {why}; {found}")


def _check_ttl(seconds: float | None) -> None:
    if seconds is not None and not (math.isfinite(seconds) and 0 < seconds <= MAX_TTL_SECONDS):
        raise invalid("ttl_seconds", f"ttl_seconds must be {TTL}; it is {shown(seconds)}")
