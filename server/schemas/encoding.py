"""The bodies of POST /v1/embeddings and /v1/fill-mask."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field

from cottention.engine.encoding import MAX_PREDICTIONS
from cottention.server.http.body import shown
from cottention.server.http.errors import invalid
from cottention.server.schemas.base import RequestModel, validate
from cottention.server.schemas.field_types import (
    PROMPTS,
    ListedStrings,
    Name,
    Prompts,
    Text,
    Texts,
)
from cottention.server.schemas.sampling import (
    BOOLEAN,
    MAX_PRIORITY,
    NAME,
    PRIORITY,
    TIMEOUT,
    ranged,
)
from cottention.server.schemas.unsupported import ANY, NeutralValues

MAX_INPUTS = 2048
"""Texts of one request, as with OpenAI."""

TOP_K = f"a whole number from 1 to {MAX_PREDICTIONS}"

ENCODING: NeutralValues = {
    "user": (ANY,),
    "truncate_prompt_tokens": (),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
}


class EncodingBody(RequestModel):
    """Fields of both endpoints."""

    neutral: ClassVar[NeutralValues] = ENCODING

    model: Text | None = Field(None, description="a string, an id from /v1/models")
    add_special_tokens: bool = Field(True, description=BOOLEAN)
    priority: int = ranged(0, PRIORITY, -MAX_PRIORITY, MAX_PRIORITY)
    timeout: float | None = ranged(None, TIMEOUT, 0)
    request_id: Name | None = Field(None, description=NAME)


class EmbeddingRequest(EncodingBody):
    """Body of POST /v1/embeddings."""

    neutral: ClassVar[NeutralValues] = {**ENCODING, "dimensions": ()}

    input: Prompts = Field(description=PROMPTS)
    encoding_format: Literal["float", "base64"] = Field("float", description='"float" or "base64"')


class FillMaskRequest(EncodingBody):
    """Body of POST /v1/fill-mask."""

    input: Texts = Field(description="text with mask tokens, or a list of such texts")
    top_k: int = ranged(5, TOP_K, 1, MAX_PREDICTIONS)
    targets: ListedStrings | None = Field(
        None, description=f"a list of 1 to {MAX_PREDICTIONS} strings, each a token"
    )


Body = TypeVar("Body", bound=EncodingBody)


def encoding_request(model: type[Body], body: Mapping[str, Any]) -> Body:
    """Validate a body. Raises ApiError 400 naming the field."""
    request = validate(model, body)
    inputs = getattr(request, "input")  # noqa: B009 - the fields differ in type
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise invalid("input", f"input must have 1 to {MAX_INPUTS} texts; it has {len(inputs)}")
    if request.timeout is not None and not 0 < request.timeout < math.inf:  # false for NaN
        raise invalid("timeout", f"timeout must be {TIMEOUT}; it is {shown(request.timeout)}")
    if abs(request.priority) > MAX_PRIORITY:
        raise invalid("priority", f"priority must be {PRIORITY}; it is {shown(request.priority)}")
    return request
