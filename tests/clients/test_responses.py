"""OpenAI's client against /v1/responses: what is stored, continued, streamed and refused."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest
from langchain_openai import ChatOpenAI
from openai import OpenAI
from openai.types.responses import Response, ResponseFunctionToolCall
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.conftest import Served, server_process, serving

GREEDY: Any = {"temperature": 0, "max_output_tokens": 12}
ADD: Any = {
    "type": "function",
    "name": "add",
    "description": "Adds.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["a"],
    },
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("sessions")
    flags = "--session-dir", str(folder), "--api-key", "another key"
    with serving(*flags, "--max-responses-per-key", "300") as served:
        yield served


def client_of(served: Served, key: str | None = None) -> OpenAI:
    return OpenAI(base_url=served.base_url, api_key=key or served.key, max_retries=0)


@pytest.fixture
def client(stored: Served) -> OpenAI:
    return client_of(stored)


def ask(client: OpenAI, said: Any, **more: Any) -> Response:
    response: Response = client.responses.create(
        model="cottention-gptj", input=said, **{**GREEDY, **more}
    )
    return response


def test_a_chain_is_as_a_chat_with_all_messages(client: OpenAI) -> None:
    first = ask(client, "hello", instructions="Be brief.", text={"verbosity": "medium"})
    second = ask(client, [{"role": "user", "content": "and?"}], previous_response_id=first.id)
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "and?"},
    ]
    for said, response in ((messages[:2], first), (messages, second)):
        chat = client.chat.completions.create(
            model="cottention-gptj", messages=said, temperature=0, max_tokens=12
        )
        assert chat.usage
        assert response.usage
        if "\ufffd" not in first.output_text:  # else the client cannot send it again
            assert chat.choices[0].message.content == response.output_text
            assert chat.usage.prompt_tokens == response.usage.input_tokens
    assert second.usage
    assert first.usage
    assert second.usage.input_tokens_details.cached_tokens == first.usage.total_tokens
    assert (second.status, second.incomplete_details and second.incomplete_details.reason) in {
        ("completed", None),
        ("incomplete", "max_output_tokens"),
    }


def test_branches_of_one_answer_are_independent(client: OpenAI) -> None:
    root = ask(client, "hello")

    def branch(number: int) -> str:
        return ask(client, f"branch {number % 4}", previous_response_id=root.id).output_text

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(branch, range(16)))
    assert texts[:4] * 4 == texts
    client.responses.delete(root.id)
    with pytest.raises(openai.NotFoundError):
        branch(0)


def test_events_come_again_as_they_came(client: OpenAI) -> None:
    more: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    calls: Any = {"tools": [ADD], "tool_choice": "required", "max_output_tokens": 80}
    for options in ({}, more, calls, {"background": True}):
        events = list(
            client.responses.create(
                model="cottention-gptj", input="hello", stream=True, **{**GREEDY, **options}
            )
        )
        assert [event.sequence_number for event in events] == list(range(len(events)))
        last: Any = events[-1]
        assert last.type in ("response.completed", "response.incomplete")
        assert client.responses.retrieve(last.response.id) == last.response
        assert list(client.responses.retrieve(last.response.id, stream=True)) == events
        rest = client.responses.retrieve(last.response.id, stream=True, starting_after=2)
        assert list(rest) == events[3:]
        deltas = "".join(
            event.delta for event in events if event.type == "response.output_text.delta"
        )
        assert deltas == last.response.output_text
    with pytest.raises(openai.BadRequestError, match="starting_after"):
        client.responses.retrieve(last.response.id, stream=True, starting_after=len(events))
    whole = ask(client, "hello")
    assert list(client.responses.retrieve(whole.id, stream=True))[-1].type == last.type


def still_running(client: OpenAI, **options: Any) -> Response:
    """A response that cannot be gone on from yet: chance ends some with their first tokens."""
    for _ in range(20):
        running = ask(client, "hello", **options)
        try:
            ask(client, "too early", previous_response_id=running.id)
        except openai.ConflictError:
            return running
    raise AssertionError("all have ended at once")


def test_background_is_followed_cancelled_and_deleted(client: OpenAI) -> None:
    queued = ask(client, "hello", background=True)
    assert queued.status == "queued"
    while (found := client.responses.retrieve(queued.id)).status in ("queued", "in_progress"):
        time.sleep(0.02)
    assert found.output_text == ask(client, "hello").output_text
    long: Any = {"background": True, "max_output_tokens": 200_000, "temperature": 1}
    long["extra_body"] = {"top_k": -1}
    ends = []
    for _ in range(2):
        running = still_running(client, **long)
        ends.append(client.responses.cancel(running.id))
        assert client.responses.retrieve(running.id).status == ends[-1].status
    assert ends[0].status in ("cancelled", "completed")
    if ends[0].status == "cancelled":
        with pytest.raises(openai.BadRequestError, match="has no state"):
            ask(client, "on", previous_response_id=ends[0].id)
    client.responses.delete(ask(client, "hello", **long).id)


def test_functions_and_their_results(client: OpenAI) -> None:
    options: Any = {"tools": [ADD], "max_output_tokens": 120}
    asked = ask(client, "add", tool_choice="required", parallel_tool_calls=False, **options)
    [call] = asked.output
    assert isinstance(call, ResponseFunctionToolCall)
    assert (call.name, asked.status) == ("add", "completed")
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
    ask(client, [result], previous_response_id=asked.id)
    whole = [{"role": "user", "content": "add"}, call.model_dump(exclude_none=True), result]
    ask(client, whole, store=False)
    with pytest.raises(openai.BadRequestError, match="no call"):
        ask(client, [{**result, "call_id": "call_0"}], previous_response_id=asked.id)
    items = client.responses.input_items.list(ask(client, whole).id, order="asc", limit=2)
    assert [item.type for item in items.data] == ["message", "function_call"]
    assert [item.type for item in items] == ["message", "function_call", "function_call_output"]


class Answer(pydantic.BaseModel):
    """What a structured answer has to be."""

    count: int


def test_structured_answers_are_parsed(client: OpenAI) -> None:
    parsed = client.responses.parse(
        model="cottention-gptj", input="count", text_format=Answer, max_output_tokens=80
    )
    assert isinstance(parsed.output_parsed, Answer)
    helper = client.responses.stream(
        model="cottention-gptj", input="count", text_format=Answer, max_output_tokens=80
    )
    with helper as stream:  # it wants an answer that is complete
        assert isinstance(stream.get_final_response().output_parsed, Answer)


REFUSED: dict[str, Any] = {
    "reasoning": {"effort": "high"},
    "conversation": "conv_1",
    "tools": [{"type": "web_search"}],
    "include": ["reasoning.encrypted_content"],
    "truncation": "middle",
    "max_output_tokens": 0,
    "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nope"}}},
    "input": [{"type": "reasoning", "summary": []}],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_apply_is_refused_by_name(client: OpenAI, name: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(
            **{"model": "cottention-gptj", "input": "x", "extra_body": {name: REFUSED[name]}}
        )
    assert str(caught.value.param).startswith(name)


def test_owners_are_apart_and_unknown_ids_are_the_same(client: OpenAI, stored: Served) -> None:
    mine, other = ask(client, "hello"), client_of(stored, "another key")
    errors = []
    for response_id in (mine.id, "resp_" + "0" * 32, "resp_1", "sess-1"):
        verbs: list[Callable[[str], object]] = [
            other.responses.retrieve,
            other.responses.delete,
            other.responses.cancel,
            other.responses.input_items.list,
            lambda each: ask(other, "x", previous_response_id=each),
        ]
        for verb in verbs:
            with pytest.raises(openai.NotFoundError) as caught:
                verb(response_id)
            errors.append(str(caught.value.message).replace(response_id, "ID"))
    assert len(set(errors)) == 2, "one for each field that has the id"
    assert client.responses.retrieve(mine.id) == mine
    listed = other.get("/sessions", cast_to=object)
    assert mine.id.removeprefix("resp_") not in str(listed)


def test_the_limit_of_a_key_is_a_429(stored: Served) -> None:
    other = client_of(stored, "another key")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ask(other, "x", max_output_tokens=1), range(300)))
    with pytest.raises(openai.RateLimitError, match="max-responses-per-key") as caught:
        ask(other, "x", max_output_tokens=1)
    assert caught.value.code == "too_many_responses"
    assert ask(other, "x", store=False).output_text


def test_without_a_folder_responses_end_with_the_server(served: Served) -> None:
    client = client_of(served)
    not_kept = ask(client, "hello")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(not_kept.id)
    kept: Any = ask(client, "hello", store=True)
    assert "--session-dir" in kept.note
    assert client.responses.retrieve(kept.id) == kept
    with pytest.raises(openai.BadRequestError, match="background"):
        ask(client, "hello", background=True)


def test_answered_responses_outlive_a_kill(tmp_path: Path) -> None:
    """What a client was told is stored; else a chain breaks with the server."""
    flags = "--session-dir", str(tmp_path)
    with server_process(*flags) as (popen, served):
        client = client_of(served)
        root = ask(client, "hello")
        with ThreadPoolExecutor(8) as pool:
            branches = list(
                pool.map(
                    lambda n: ask(client, f"branch {n % 3}", previous_response_id=root.id),
                    range(24),
                )
            )
        expected = [ask(client, "on", previous_response_id=b.id).output_text for b in branches[:3]]
        popen.kill()
        popen.wait()
    with serving(*flags) as served:
        client = client_of(served)
        for place, each in enumerate(branches):
            assert client.responses.retrieve(each.id) == each
            continued = ask(client, "on", previous_response_id=each.id)
            assert continued.output_text == expected[place % 3]


def test_frameworks_use_it(stored: Served) -> None:
    """LangChain and pydantic-ai send what their own tests send to OpenAI."""
    options: Any = {"base_url": stored.base_url, "api_key": stored.key, "max_retries": 0}
    options |= {"model": stored.model, "use_responses_api": True, "temperature": 0}
    model = ChatOpenAI(max_tokens=12, **options)
    whole = model.invoke("hello")
    assert "".join(str(part.text) for part in model.stream("hello")) == whole.text
    chained = ChatOpenAI(max_tokens=12, use_previous_response_id=True, **options)
    first = chained.invoke("hello")
    assert chained.invoke([("user", "hello"), first, ("user", "more")]).response_metadata["id"]
    longer = ChatOpenAI(max_tokens=200, **options)
    asked = longer.bind_tools([Answer], tool_choice="Answer").invoke("hello")
    assert [call["name"] for call in asked.tool_calls] == ["Answer"]
    assert isinstance(longer.with_structured_output(Answer).invoke("hello"), Answer)
    provider = OpenAIProvider(base_url=stored.base_url, api_key=stored.key)
    agent = Agent(OpenAIResponsesModel(stored.model, provider=provider), output_type=Answer)
    assert isinstance(agent.run_sync("hello").output, Answer)
