"""Anthropic's client against /v1/messages: a chat by other names, and errors in its own form."""

from typing import Any

import anthropic
import httpx
import openai
import pytest
from anthropic import Anthropic
from anthropic.types import TextBlock, ToolUseBlock

from tests.clients.conftest import Served

SAID: Any = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
GREEDY: Any = {"model": "cottention-gptj", "max_tokens": 16, "extra_body": {"temperature": 0}}
TOOLS: Any = [
    {
        "name": "add",
        "description": "Adds.",
        "input_schema": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["a"],
        },
    }
]


@pytest.fixture
def client(served: Served) -> Anthropic:
    return Anthropic(base_url=served.url, api_key=served.key, max_retries=0)


def test_a_message_is_the_answer_of_a_chat(client: Anthropic, served: Served) -> None:
    message = client.messages.create(messages=SAID, system="Be brief.", **GREEDY)
    [block] = message.content
    assert isinstance(block, TextBlock)
    chat = openai.OpenAI(base_url=served.base_url, api_key=served.key).chat.completions.create(
        model=served.model,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
        temperature=0,
        max_tokens=16,
    )
    assert chat.choices[0].message.content == block.text
    assert message.stop_reason == "max_tokens"
    counted = client.messages.count_tokens(
        model=served.model, messages=SAID, system="Be brief."
    ).input_tokens
    usage = message.usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    with client.messages.stream(messages=SAID, system="Be brief.", **GREEDY) as stream:
        assert "".join(stream.text_stream) == block.text
        assert stream.get_final_message().stop_reason == "max_tokens"


def test_prefill_and_stop_sequences(client: Anthropic) -> None:
    begun: Any = [*SAID, {"role": "assistant", "content": "def f"}]
    whole = client.messages.create(messages=begun, **GREEDY)
    assert isinstance(whole.content[0], TextBlock)
    part = whole.content[0].text[2:5]
    stopped = client.messages.create(messages=begun, stop_sequences=[part], **GREEDY)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", part)


def test_tools_are_called_and_answered(client: Anthropic, served: Served) -> None:
    asked: Any = {"model": served.model, "max_tokens": 300, "messages": SAID, "tools": TOOLS}
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    message = client.messages.create(tool_choice=choice, **asked)
    [call] = message.content
    assert isinstance(call, ToolUseBlock)
    assert (call.name, message.stop_reason) == ("add", "tool_use")
    with client.messages.stream(tool_choice={"type": "tool", "name": "add"}, **asked) as stream:
        [streamed] = stream.get_final_message().content
        assert isinstance(streamed, ToolUseBlock)
        assert set(streamed.input) == {"a"}
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "5"}
    more: Any = [{"role": "assistant", "content": message.content}]
    asked["messages"] = [*SAID, *more, {"role": "user", "content": [result]}]
    asked["max_tokens"] = 4
    assert client.messages.create(tool_choice={"type": "none"}, **asked).usage.output_tokens <= 4


REFUSED: dict[str, Any] = {
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "tools": [{"type": "web_search_20250305", "name": "web_search"}],
    "messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}],
    "stop_sequences": "text",
    "max_tokens": 0,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_apply_is_refused_by_name(client: Anthropic, name: str) -> None:
    given = {"messages": SAID, "model": "cottention-gptj", "max_tokens": 4, name: REFUSED[name]}
    with pytest.raises(anthropic.BadRequestError, match=name) as caught:
        client.messages.create(**given)
    body: Any = caught.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert body["request_id"]


def test_keys_and_other_errors_have_the_form(client: Anthropic, served: Served) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(messages=SAID, model="another", max_tokens=4)
    with pytest.raises(anthropic.AuthenticationError):
        Anthropic(base_url=served.url, api_key="no", max_retries=0).messages.create(
            messages=SAID, **GREEDY
        )
    body = {"messages": SAID, "max_tokens": 1}
    for headers, status in (({"x-api-key": served.key}, 200), ({"x-api-key": "no"}, 401)):
        found = httpx.post(f"{served.url}/v1/messages", headers=headers, json=body)
        assert found.status_code == status
    elsewhere = httpx.get(f"{served.base_url}/models", headers={"x-api-key": served.key})
    assert elsewhere.status_code == 401
