"""Responses of /v1/embeddings and /v1/fill-mask, for the OpenAPI description."""

from typing import Literal

from pydantic import BaseModel


class EncodingUsage(BaseModel):
    """Tokens of a request's texts, special tokens included."""

    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    """The vector of one text: numbers, or their float32 in little-endian order as base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    """Response of POST /v1/embeddings."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Embedding]
    usage: EncodingUsage


class PredictedToken(BaseModel):
    """A token for a masked place, and its probability over the whole vocabulary."""

    token: int
    token_str: str
    score: float


class FilledMask(BaseModel):
    """The most probable tokens of one masked place; `position` is its index in the text's ids."""

    position: int
    predictions: list[PredictedToken]


class FilledText(BaseModel):
    """The masks of one text, in order."""

    object: Literal["fill_mask"]
    index: int
    masks: list[FilledMask]


class FilledMasks(BaseModel):
    """Response of POST /v1/fill-mask."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[FilledText]
    usage: EncodingUsage
