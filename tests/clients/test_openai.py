"""OpenAI's own client for Python: sync, async, streaming, retries, its exception types."""

import signal
import string
import subprocess
import time
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI, types

from tests.clients.conftest import ROOT, SERVER_PYTHON, Served
from tests.clients.expected import PROMPT, SAID, WAYS, texts

MESSAGES: Any = [{"role": "user", "content": SAID}]


@pytest.fixture
def client(served: Served) -> OpenAI:
    return OpenAI(base_url=served.base_url, api_key=served.key, max_retries=0)


@pytest.fixture
def eager(served: Served) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=served.base_url, api_key=served.key, max_retries=0)


@pytest.mark.parametrize("way", WAYS)
def test_sync(client: OpenAI, served: Served, way: str) -> None:
    completion = client.completions.create(model=served.model, prompt=PROMPT, **WAYS[way])
    assert completion.choices[0].text == texts()["completion", way]
    assert completion.usage
    assert completion.usage.completion_tokens == 24
    chat = client.chat.completions.create(model=served.model, messages=MESSAGES, **WAYS[way])
    assert chat.choices[0].message.content == texts()["chat", way]


@pytest.mark.parametrize("way", WAYS)
def test_streaming(client: OpenAI, served: Served, way: str) -> None:
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(
        client.completions.create(model=served.model, prompt=PROMPT, **options, **WAYS[way])
    )
    told = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert told == texts()["completion", way]
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 24
    parts = list(
        client.chat.completions.create(
            model=served.model, messages=MESSAGES, **options, **WAYS[way]
        )
    )
    assert parts[0].choices[0].delta.role == "assistant"
    told = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert told == texts()["chat", way]


@pytest.mark.parametrize("way", WAYS)
async def test_async(eager: AsyncOpenAI, served: Served, way: str) -> None:
    completion = await eager.completions.create(model=served.model, prompt=PROMPT, **WAYS[way])
    assert completion.choices[0].text == texts()["completion", way]
    stream = await eager.chat.completions.create(
        model=served.model, messages=MESSAGES, stream=True, **WAYS[way]
    )
    told = [part.choices[0].delta.content or "" async for part in stream]
    assert "".join(told) == texts()["chat", way]


def test_the_stream_helper_of_chats(client: OpenAI, served: Served) -> None:
    """It takes a length limit for an error, and has the text with it."""
    body: Any = {"model": served.model, "messages": MESSAGES, **WAYS["greedy"]}
    with (
        client.chat.completions.stream(**body) as stream,
        pytest.raises(openai.LengthFinishReasonError) as ended,
    ):
        stream.get_final_completion()
    assert ended.value.completion.choices[0].message.content == texts()["chat", "greedy"]


def test_logprobs_of_both_kinds(client: OpenAI, served: Served) -> None:
    completion = client.completions.create(
        model=served.model, prompt=PROMPT, max_tokens=0, echo=True, logprobs=2
    )
    assert completion.choices[0].text == PROMPT
    told = completion.choices[0].logprobs
    assert told
    assert told.token_logprobs
    assert told.token_logprobs[0] is None
    chat = client.chat.completions.create(
        model=served.model, messages=MESSAGES, max_tokens=2, logprobs=True, top_logprobs=3
    )
    assert chat.choices[0].logprobs
    assert chat.choices[0].logprobs.content
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 3


def test_an_answer_that_is_begun_and_named_ids(client: OpenAI, served: Served) -> None:
    """vLLM's `continue_final_message` and `logprob_token_ids`, llama.cpp's DRY, and no cache."""
    begun = texts()["chat", "greedy"][:6]
    chat = client.chat.completions.create(
        model=served.model,
        messages=[*MESSAGES, {"role": "assistant", "content": begun}],
        max_tokens=2,
        logprobs=True,
        extra_body={
            "continue_final_message": True,
            "add_generation_prompt": False,
            "logprob_token_ids": [9, 250, 3],
            "dry_multiplier": 0.8,
            "dry_sequence_breakers": ["."],
            "cache": {"read": False, "write": False},
            "ignore_eos": True,
        },
    )
    assert chat.choices[0].logprobs
    assert chat.choices[0].logprobs.content
    assert [len(each.top_logprobs) for each in chat.choices[0].logprobs.content] == [3, 3]


def test_a_stream_is_cancelled_by_its_id(client: OpenAI, served: Served) -> None:
    """It ends as others do, so that what has come can be used; nobody repeats it."""
    body: Any = {"max_tokens": 100_000, "stream": True, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(model=served.model, prompt=PROMPT, **body)
    first = next(iter(stream))
    told = client.post(f"/requests/{first.id}/cancel", cast_to=object)
    assert told == {"id": first.id, "status": "cancelled"}
    *_, last = stream
    assert str(last.choices[0].finish_reason) == "abort"
    with pytest.raises(openai.NotFoundError):
        client.post("/requests/unknown/cancel", cast_to=object)


def test_n_and_extra_fields(client: OpenAI, served: Served) -> None:
    completion = client.completions.create(
        model=served.model,
        prompt=[PROMPT, "x"],
        n=2,
        max_tokens=4,
        extra_body={"top_k": 5, "ignore_eos": True, "return_token_ids": True},
    )
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert all(choice.finish_reason == "length" for choice in completion.choices)


def test_models(client: OpenAI, served: Served) -> None:
    assert [model.id for model in client.models.list()] == [served.model]
    assert client.models.retrieve(served.model).id == served.model


BODIES: list[tuple[str, dict[str, Any], Any]] = [
    ("completions", {"prompt": PROMPT, "logprobs": 2}, types.Completion),
    ("completions", {"prompt": PROMPT, "best_of": 2, "return_token_ids": True}, types.Completion),
    ("chat/completions", {"messages": MESSAGES}, types.chat.ChatCompletion),
    ("chat/completions", {"messages": MESSAGES, "logprobs": True}, types.chat.ChatCompletion),
]


@pytest.mark.parametrize(("path", "body", "model"), BODIES, ids=repr)
def test_whole_answers_are_valid_by_its_own_models(
    served: Served, path: str, body: dict[str, Any], model: Any
) -> None:
    """It builds its objects without validation; clients in stricter languages do validate."""
    answer = post(served, path, {"max_tokens": 8} | body).json()
    found = model.model_validate(answer)
    assert found.usage.prompt_tokens_details is found.service_tier is None
    assert {"system_fingerprint", "service_tier", "kv_transfer_params"} <= answer.keys()


@pytest.mark.parametrize("more", [{}, {"logprobs": True, "top_logprobs": 2}, {"n": 2}], ids=repr)
def test_chunks_are_valid_by_its_own_models(served: Served, more: dict[str, Any]) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"messages": MESSAGES, "max_tokens": 8, "stream": True, "stream_options": options}
    events = post(served, "chat/completions", body | more).text.split("\n\n")
    *chunks, last = [
        types.chat.ChatCompletionChunk.model_validate_json(each.removeprefix("data: "))
        for each in events[:-2]
    ]
    counts: dict[int, list[int]] = {}
    for chunk in chunks:
        (choice,) = chunk.choices
        assert chunk.usage
        counts.setdefault(choice.index, []).append(chunk.usage.completion_tokens)
        assert choice.finish_reason or choice.delta.content is not None
    for found in counts.values():
        assert found[0] == 0
        assert found == sorted(set(found))
    assert last.usage
    assert last.usage.completion_tokens == sum(found[-1] for found in counts.values())


def post(served: Served, path: str, body: dict[str, Any]) -> httpx.Response:
    headers = {"Authorization": f"Bearer {served.key}"}
    answer = httpx.post(f"{served.base_url}/{path}", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


def test_refusals_are_its_own_exceptions(client: OpenAI, served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=served.model, prompt="x", temperature=-1)
    assert refused.value.param == "temperature"
    assert refused.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-9", prompt="x")
    tools: Any = [{"type": "function", "function": {"name": "no name"}}]
    with pytest.raises(openai.BadRequestError, match="tool"):
        client.chat.completions.create(model=served.model, messages=MESSAGES, tools=tools)
    stranger = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError) as unknown:
        stranger.models.list()
    assert unknown.value.code == "invalid_api_key"


def test_a_timeout_leaves_nothing_behind(client: OpenAI, served: Served) -> None:
    hasty = client.with_options(timeout=0.2)
    with pytest.raises(openai.APITimeoutError):
        hasty.completions.create(
            model=served.model, prompt="x", max_tokens=1_000_000, extra_body={"ignore_eos": True}
        )
    assert client.completions.create(model=served.model, prompt="x", max_tokens=1).choices


class Flaky(httpx.HTTPTransport):
    """A network that fails at first."""

    num_failures = 2

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Fail, or pass on."""
        if self.num_failures:
            self.num_failures -= 1
            raise httpx.ConnectError("told to fail")
        return super().handle_request(request)


def test_retries(served: Served) -> None:
    with httpx.Client(transport=Flaky()) as network:
        client = OpenAI(
            base_url=served.base_url, api_key=served.key, max_retries=2, http_client=network
        )
        completion = client.completions.create(model=served.model, prompt=PROMPT, **WAYS["greedy"])
    assert completion.choices[0].text == texts()["completion", "greedy"]


def test_a_server_that_shuts_down_is_its_own_exception() -> None:
    """What runs is finished, and newcomers hear when to come again."""
    command = [SERVER_PYTHON, "-m", "tests.server.fake_main", "0.1", "20"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as popen:
        assert popen.stdout
        url = popen.stdout.readline().strip()
        client = OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        running = client.completions.create(model="fake", prompt="x", max_tokens=26, stream=True)
        first = next(iter(running)).choices[0].text
        popen.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model="fake", prompt="x")
        assert refused.value.status_code == 503
        assert int(refused.value.response.headers["retry-after"]) > 0
        rest = "".join(chunk.choices[0].text for chunk in running)
        assert first + rest == string.ascii_lowercase
        assert popen.wait(20) == 0


def test_every_field_of_its_own_schemas_is_on_the_page() -> None:
    """What a newer client may send is built, accepted where neutral, or refused by name."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    bodies = (
        openai.types.chat.completion_create_params.CompletionCreateParamsBase,
        openai.types.completion_create_params.CompletionCreateParamsBase,
        openai.types.chat.ChatCompletionStreamOptionsParam,
    )
    names = {name for body in bodies for name in body.__annotations__}
    assert {name for name in names if f"`{name}`" not in page} == set()
