"""Embeddings through openai and langchain-openai, by a server process with a small encoder."""

import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from langchain_openai import OpenAIEmbeddings
from openai import AsyncOpenAI, OpenAI
from pydantic import SecretStr

from cottention.engine.config import EngineConfig
from cottention.engine.encoder_engine import EncoderEngine
from tests.clients.conftest import Served, serving
from tests.engine.encoders import encoder_folder

TEXTS = ["the cat sat", "a big dog", "the mat!"] * 3


@pytest.fixture(scope="module")
def encoder() -> Iterator[Served]:
    with serving(model=encoder_folder()) as served:
        yield served


@pytest.fixture(scope="module")
def expected() -> list[list[float]]:
    """By the engine, without a server: the same bits."""
    engine = EncoderEngine(encoder_folder(), EngineConfig(max_slots=4))
    found = [each.embedding for each in engine.encode(TEXTS)]
    return [list(struct.unpack(f"<{len(raw) // 4}f", raw)) for raw in found]


def test_openai(encoder: Served, expected: list[list[float]]) -> None:
    """Unless told otherwise the client asks for base64 and decodes it."""
    client = OpenAI(base_url=encoder.base_url, api_key=encoder.key, max_retries=0)
    for form in (openai.omit, "float", "base64"):
        answer = client.embeddings.create(model=encoder.model, input=TEXTS, encoding_format=form)
        if form != "base64":
            assert [each.embedding for each in answer.data] == expected
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    with pytest.raises(openai.BadRequestError, match="as wide as the model"):
        client.embeddings.create(model=encoder.model, input="a", dimensions=8)
    with pytest.raises(openai.BadRequestError, match="does not serve completions"):
        client.completions.create(model=encoder.model, prompt="a")


async def test_openai_async(encoder: Served, expected: list[list[float]]) -> None:
    client = AsyncOpenAI(base_url=encoder.base_url, api_key=encoder.key, max_retries=0)
    answer = await client.embeddings.create(model=encoder.model, input=TEXTS[0])
    assert answer.data[0].embedding == expected[0]


def test_langchain(encoder: Served, expected: list[list[float]]) -> None:
    """Its check of lengths would download a tokenizer that is not the model's."""
    embeddings = OpenAIEmbeddings(
        base_url=encoder.base_url,
        api_key=SecretStr(encoder.key),
        model=encoder.model,
        check_embedding_ctx_length=False,
    )
    assert embeddings.embed_documents(TEXTS) == expected
    assert embeddings.embed_query(TEXTS[1]) == expected[1]
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(embeddings.embed_query, (TEXTS * 8)[:64]))
    assert answers == (expected * 8)[:64]


def test_masks_by_hand(encoder: Served) -> None:
    response = httpx.post(
        f"{encoder.base_url}/fill-mask",
        json={"input": "the [MASK] sat", "targets": ["cat", "dog"]},
        headers={"Authorization": f"Bearer {encoder.key}"},
    )
    [mask] = response.json()["data"][0]["masks"]
    assert {each["token_str"] for each in mask["predictions"]} == {"cat", "dog"}
