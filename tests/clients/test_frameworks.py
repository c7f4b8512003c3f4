"""langchain-openai and litellm: the same texts, whole and streamed, and their own exceptions."""

from typing import Any

import litellm
import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import SecretStr

from tests.clients.conftest import Served
from tests.clients.expected import PROMPT, SAID, WAYS, texts

MESSAGES = [{"role": "user", "content": SAID}]


def chain_settings(served: Served, way: str) -> dict[str, Any]:
    key = SecretStr(served.key)
    return {"base_url": served.base_url, "api_key": key, "model": served.model, **WAYS[way]}


@pytest.mark.parametrize("way", WAYS)
def test_langchain_completions(served: Served, way: str) -> None:
    model = OpenAI(**chain_settings(served, way))
    assert model.invoke(PROMPT) == texts()["completion", way]
    assert "".join(model.stream(PROMPT)) == texts()["completion", way]


@pytest.mark.parametrize("way", WAYS)
async def test_langchain_chats(served: Served, way: str) -> None:
    model = ChatOpenAI(**chain_settings(served, way))
    answer = model.invoke(SAID)
    assert answer.content == texts()["chat", way]
    assert answer.usage_metadata
    assert answer.usage_metadata["output_tokens"] == 24
    assert "".join(str(part.content) for part in model.stream(SAID)) == texts()["chat", way]
    assert (await model.ainvoke(SAID)).content == texts()["chat", way]


def test_langchain_batches_and_logprobs(served: Served) -> None:
    model = ChatOpenAI(**chain_settings(served, "greedy")).bind(logprobs=True, top_logprobs=2)
    answers = model.batch([SAID] * 4)
    assert {answer.content for answer in answers} == {texts()["chat", "greedy"]}
    assert len(answers[0].response_metadata["logprobs"]["content"]) == 24


def lite(served: Served, way: str) -> dict[str, Any]:
    return {"api_base": served.base_url, "api_key": served.key, **WAYS[way]}


@pytest.mark.parametrize("way", WAYS)
def test_litellm_completions(served: Served, way: str) -> None:
    name = f"text-completion-openai/{served.model}"
    answer = litellm.text_completion(model=name, prompt=PROMPT, **lite(served, way))
    assert answer.choices[0].text == texts()["completion", way]
    stream = litellm.text_completion(model=name, prompt=PROMPT, stream=True, **lite(served, way))
    told = "".join(chunk.choices[0].text or "" for chunk in stream)
    assert told == texts()["completion", way]


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
@pytest.mark.parametrize("way", WAYS)
def test_litellm_chats(served: Served, way: str, provider: str) -> None:
    name = f"{provider}/{served.model}"
    answer = litellm.completion(model=name, messages=MESSAGES, **lite(served, way))
    assert answer.choices[0].message.content == texts()["chat", way]
    stream = litellm.completion(model=name, messages=MESSAGES, stream=True, **lite(served, way))
    told = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert told == texts()["chat", way]


def test_refusals_are_their_own_exceptions(served: Served) -> None:
    settings = lite(served, "greedy") | {"temperature": -1}
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(model=f"openai/{served.model}", messages=MESSAGES, **settings)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(
            model=f"openai/{served.model}",
            messages=MESSAGES,
            api_base=served.base_url,
            api_key="wrong",
        )
    chain = ChatOpenAI(**chain_settings(served, "greedy") | {"temperature": -1}, max_retries=0)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chain.invoke(SAID)
