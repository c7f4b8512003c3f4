"""What a completion request may hold, and what its answers look like.

Owns names, types and the words that say what is allowed; ranges are the engine's
(`SamplingParams`). Does not know how a request is answered.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from engine.params import SamplingParams
from server.body import is_text, shown
from server.errors import ApiError, invalid
from server.neutral import NEUTRAL_STREAM_OPTIONS, NEUTRAL_VALUES, is_neutral

MAX_CHOICES = 128
"""Most continuations of one request: its prompts times n."""

Prompt = str | list[int]


def _prompts(value: Any) -> list[Prompt]:
    """One prompt or several, as text or as ids → a list of prompts."""
    match value:
        case str() | [int(), *_]:
            prompts = [value]
        case list():
            prompts = value
        case _:
            raise PydanticCustomError("wrong_type", "wrong type")
    if not prompts or "" in prompts or [] in prompts:
        raise PydanticCustomError("told", "prompt must not be empty")
    if not (all(isinstance(each, str) for each in prompts) or all(map(_is_ids, prompts))):
        raise PydanticCustomError("wrong_type", "wrong type")
    if not all(is_text(each) for each in prompts if isinstance(each, str)):
        raise PydanticCustomError("told", "prompt has a lone surrogate, which is no character")
    return prompts


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)


def _strings(value: Any) -> tuple[str, ...]:
    """`stop` is one string or a list of them."""
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(each, str) for each in strings):
        raise PydanticCustomError("wrong_type", "wrong type")
    if not all(map(is_text, strings)):
        raise PydanticCustomError("told", "stop has a lone surrogate, which is no character")
    return tuple(strings)


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StreamOptions(_Body):
    """What a stream tells beside its text."""

    include_usage: bool = Field(False, description="true or false")


class CompletionRequest(_Body):
    """Body of POST /v1/completions. Every description completes the sentence "it must be"."""

    prompt: Annotated[
        list[Prompt],
        PlainValidator(
            _prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
        ),
        Field(description="a string, a list of strings, a list of token ids or a list of those"),
    ]
    model: str | None = Field(None, description="a string, an id from /v1/models")
    max_tokens: int = Field(16, description="a whole number from 1")
    temperature: float = Field(1.0, description="a finite number from 0")
    top_p: float = Field(1.0, description="a number greater than 0 and at most 1")
    top_k: int = Field(0, description="a whole number from 1, or 0 or -1 for all tokens")
    min_p: float = Field(0.0, description="a number from 0 to 1")
    seed: int | None = Field(None, description="a whole number of 64 bits")
    stop: Annotated[
        tuple[str, ...],
        PlainValidator(_strings, json_schema_input_type=str | list[str]),
        Field(description="a string or a list of strings"),
    ] = ()
    n: int = Field(1, description="a whole number from 1")
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions | None = Field(None, description="an object")
    ignore_eos: bool = Field(False, description="true or false")

    def sampling_params(self) -> SamplingParams:
        """The engine's parameters. Raises ParameterError."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            stop=self.stop,
            n=self.n,
            ignore_eos=self.ignore_eos,
        )


class Usage(BaseModel):
    """Tokens of a whole request: every prompt once, every choice."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length", "cancelled"]


class Completion(BaseModel):
    """Answer of POST /v1/completions when it does not stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


def completion_request(body: Mapping[str, Any]) -> CompletionRequest:
    """Check a body; null counts as absent. Raises ApiError 400 naming the field."""
    given = _known(body, "", CompletionRequest, {**NEUTRAL_VALUES, **_best_of(body)})
    if isinstance(options := given.get("stream_options"), dict):
        given["stream_options"] = _known(
            options, "stream_options.", StreamOptions, NEUTRAL_STREAM_OPTIONS
        )
    try:
        request = CompletionRequest.model_validate(given)
    except ValidationError as error:
        raise _as_api_error(error.errors()[0]) from None
    if len(request.prompt) * request.n > MAX_CHOICES:
        asked = f"{len(request.prompt)} × {request.n}"
        raise invalid(
            "n" if request.n > MAX_CHOICES else "prompt",
            f"prompts times n must be at most {MAX_CHOICES}; it is {asked}",
        )
    if request.stream_options and not request.stream:
        raise invalid("stream_options", "stream_options is only allowed where stream is true")
    return request


def _best_of(body: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The best n of n are all of them."""
    n = body.get("n")
    return {"best_of": (1 if n is None else n,)}


def _known(
    body: Mapping[str, Any],
    prefix: str,
    model: type[BaseModel],
    neutral: Mapping[str, tuple[Any, ...]],
) -> dict[str, Any]:
    """The fields that are built, nulls left out; the others must change nothing."""
    given = {name: value for name, value in body.items() if value is not None}
    for name in given.keys() - model.model_fields.keys():
        if name not in neutral:
            raise invalid(prefix + name, f"there is no field {shown(prefix + name)}")
        if not is_neutral(neutral[name], given.pop(name)):
            raise invalid(
                prefix + name, f"{prefix}{name} is not supported yet: {_only(neutral[name])}"
            )
    return given


def _only(neutral: tuple[Any, ...]) -> str:
    """What may be sent for a field that is not built."""
    return "leave it out" + "".join(f" or send {shown(value)}" for value in neutral)


def _as_api_error(error: ErrorDetails) -> ApiError:
    *_, name = path = [str(each) for each in error["loc"]]
    param = ".".join(path)
    if error["type"] == "told":
        return invalid(param, error["msg"])
    fields = StreamOptions.model_fields if len(path) > 1 else CompletionRequest.model_fields
    allowed = fields[name].description
    if error["type"] == "missing":
        return invalid(param, f"{param} is required; it must be {allowed}")
    return invalid(param, f"{param} must be {allowed}; it is {shown(error['input'])}")
