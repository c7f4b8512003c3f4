"""Response bodies, for the OpenAPI description; responses are not validated against them."""

from typing import Any, Literal

from pydantic import BaseModel

from cottention.engine.encoding import Capability
from cottention.engine.outputs import FinishReason

JsonObject = dict[str, Any]


class ErrorDetail(BaseModel):
    """What went wrong, and the field to change if there is one."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorDetail


class SessionSummary(BaseModel):
    """The session after a turn, in the turn's response."""

    id: str
    position: int
    context_start: int
    durable: bool


class PromptTokensDetails(BaseModel):
    """Prompt tokens that were restored from the prefix cache; null if there are none."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request: every prompt once, and every generated choice."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class Timings(BaseModel):
    """Times of a request, in llama.cpp's shape: milliseconds, and tokens per second.

    cache_n: tokens before the prompt's own that were not computed: of a session, or restored from
    the prefix cache. prompt: from the first slot to the first token. predicted: from there to the
    last token, of all choices together.
    """

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class RankedLogprob(BaseModel):
    """A token of a prompt or an alternative to it, in vLLM's shape."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, RankedLogprob] | None]


class Logprobs(BaseModel):
    """Log-probabilities of a completion, in OpenAI's shape."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    """One continuation of a prompt."""

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
    """Response of POST /v1/completions without stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    service_tier: None
    system_fingerprint: None
    kv_transfer_params: None
    session: SessionSummary | None = None
    timings: Timings | None = None
    state: str | None = None


class ChatToken(BaseModel):
    """A token with its log-probability and bytes."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprobs(ChatToken):
    """A generated token and the most likely alternatives."""

    top_logprobs: list[ChatToken]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a chat, in OpenAI's shape."""

    content: list[ChatTokenLogprobs]
    refusal: None


class CalledFunction(BaseModel):
    """A function that the model calls, and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(BaseModel):
    """The message that the model generated; content is null where it has calls alone."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    annotations: None
    audio: None
    function_call: None
    tool_calls: list[ToolCall] | None
    reasoning: None


class ChatChoice(BaseModel):
    """One response message."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"] | None
    stop_reason: str | int | None
    context_start: int
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """Response of POST /v1/chat/completions without stream."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: None
    system_fingerprint: None
    kv_transfer_params: None
    session: SessionSummary | None = None
    timings: Timings | None = None
    state: str | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Model(BaseModel):
    """The served model; `max_model_len` is its trained length, which is not a limit, but for an
    encoder, whose longest text it is.

    max_model_len: null where the model's files do not say it.
    root: the model's own name, also where it is served under another one.
    chat_template: whether there is a template, without which chats are a 400.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int | None
    capabilities: list[Capability]
    chat_template: bool


class ModelList(BaseModel):
    """The served models; there is one."""

    object: Literal["list"]
    data: list[Model]


class Status(BaseModel):
    """The state of the server."""

    status: Literal["alive", "ready"]


class Version(BaseModel):
    """The version of the server."""

    version: str


class Tokenized(BaseModel):
    """Token ids of a text or a chat, and the tokenizer's own strings of them if requested."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    """The text of token ids."""

    prompt: str
