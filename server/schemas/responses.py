"""What answers look like, for the published description; nothing is validated against it here.

Owns the shapes of every body but those of requests. Knows no endpoint.
"""

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "cancelled", "timeout", "unread", "error"]


class ErrorDetail(BaseModel):
    """What went wrong, and the field to change where there is one."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer other than success."""

    error: ErrorDetail


class TurnedSession(BaseModel):
    """What a turn's answer tells of its session."""

    id: str
    position: int
    context_start: int
    durable: bool


class PromptTokensDetails(BaseModel):
    """Of prompts that began as an earlier one: tokens that were not read again. Told above 0."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a whole request: every prompt once, every choice that was tried."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class RankedLogprob(BaseModel):
    """vLLM's shape: a token at some place of a prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, RankedLogprob] | None]


class Logprobs(BaseModel):
    """OpenAI's shape for completions."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    context_start: int | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Completion(BaseModel):
    """Answer of POST /v1/completions when it does not stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    session: TurnedSession | None = None


class ChatToken(BaseModel):
    """A token and its bytes."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprobs(ChatToken):
    """A drawn token beside the likeliest ones."""

    top_logprobs: list[ChatToken]


class ChatLogprobs(BaseModel):
    """OpenAI's shape for chats."""

    content: list[ChatTokenLogprobs]
    refusal: None


class Message(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer of the model."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    context_start: int
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """Answer of POST /v1/chat/completions when it does not stream."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    session: TurnedSession | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Model(BaseModel):
    """The served model; `max_model_len` is its trained length, which limits nothing here."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """All models, which are one."""

    object: Literal["list"]
    data: list[Model]


class Status(BaseModel):
    """How the server is."""

    status: Literal["alive", "ready"]


class Version(BaseModel):
    """Of the distribution."""

    version: str


class Tokenized(BaseModel):
    """Ids of a text or a chat."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    """Text of ids."""

    prompt: str


JsonObject = dict[str, Any]
