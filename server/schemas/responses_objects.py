"""Objects that /v1/responses answers with, for its description."""

from typing import Any, Literal

from pydantic import BaseModel

from cottention.server.schemas.responses import JsonObject


class ResponseObject(BaseModel):
    """A response. note: where it is kept for a shorter time than one might think."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    completed_at: int | None
    error: JsonObject | None
    incomplete_details: JsonObject | None
    model: str
    output: list[JsonObject]
    usage: JsonObject | None
    background: bool
    store: bool
    instructions: str | None
    previous_response_id: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    temperature: float
    top_p: float
    top_logprobs: int
    text: JsonObject
    tool_choice: Any
    tools: list[JsonObject]
    truncation: Literal["auto", "disabled"]
    reasoning: JsonObject
    service_tier: str
    user: str | None
    note: str | None = None


class InputItemList(BaseModel):
    """Items that a response answers."""

    object: Literal["list"]
    data: list[JsonObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedResponse(BaseModel):
    """A response that was deleted."""

    id: str
    object: Literal["response"]
    deleted: bool
