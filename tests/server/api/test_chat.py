"""POST /v1/chat/completions: the template's prompt, OpenAI's forms, what ends an answer."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cottention.server.generation.chat_template import ChatTemplate, find_template
from tests.server.http.test_bad_input import refused
from tests.server.live import Live, serving

SAY = "say:{{ messages[-1].content }}{{ tail }}"


def template(tmp_path: Path, source: str = SAY) -> ChatTemplate:
    (tmp_path / "chat_template.jinja").write_text(source)
    found = find_template(None, tmp_path)
    assert isinstance(found, ChatTemplate)
    return found


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server whose model says what the user said."""
    with serving(template=template(tmp_path_factory.mktemp("model"))) as live:
        yield live


def chunks(live: Live, *said: str, **body: Any) -> list[Any]:
    response = live.chat(*said, stream=True, **body)
    assert response.status_code == 200, response.text
    *blocks, done, last = response.text.split("\n\n")
    assert (done, last) == ("data: [DONE]", "")
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_a_whole_response_has_openai_s_shape(live: Live) -> None:
    answer = live.chat("one").json()
    assert answer.pop("id").startswith("chatcmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "chat.completion",
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "one",
                    "refusal": None,
                    "annotations": None,
                    "audio": None,
                    "function_call": None,
                    "tool_calls": None,
                    "reasoning": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "context_start": 0,
                "token_ids": None,
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "total_tokens": 10,
            "prompt_tokens_details": None,
        },
        "service_tier": None,
        "system_fingerprint": None,
        "kv_transfer_params": None,
        "prompt_token_ids": None,
        "prompt_logprobs": None,
    }


def test_a_response_message_can_be_sent_back_unchanged(live: Live) -> None:
    """Clients append the message that they got; its nulls must not be refused."""
    message = live.chat("one").json()["choices"][0]["message"]
    messages = [{"role": "user", "content": "x"}, message, {"role": "user", "content": "two"}]
    answer = live.client.post("/v1/chat/completions", json={"messages": messages}).json()
    assert answer["choices"][0]["message"]["content"] == "two"


HELD_BACK = [
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 3, "n": 2},
    {"return_token_ids": True},
    {"return_token_ids": True, "stream_options": {"include_usage": True}},
]


@pytest.mark.parametrize("details", HELD_BACK, ids=repr)
def test_a_token_whose_text_is_held_back_has_an_empty_content(tmp_path: Path, details: Any) -> None:
    """Clients read `delta.content` of every chunk but the last."""
    with serving(template=template(tmp_path, "quiet")) as live:
        live.step_with_loop()
        found = chunks(live, "x", max_tokens=3, ignore_eos=True, **details)
        choices = [choice for chunk in found for choice in chunk["choices"]]
        contents = [each["delta"]["content"] for each in choices if not each["finish_reason"]]
        assert set(contents) == {""}
        assert len(contents) == details.get("n", 1) * 3  # the role, and two tokens
        ends = [each["delta"] for each in choices if each["finish_reason"]]
        assert ends == [{"content": "c"}] * details.get("n", 1)


def test_a_turn_s_token_whose_text_is_held_back_has_an_empty_content(tmp_path: Path) -> None:
    with serving(template=template(tmp_path, "quiet")) as live:
        live.step_with_loop()
        found = chunks(live, "x", max_tokens=3, ignore_eos=True, session_id=live.opened())
        deltas = [chunk["choices"][0]["delta"] for chunk in found]
        assert [each["content"] for each in deltas] == ["", "", "", "c"]


@pytest.mark.parametrize("details", [{}, {"logprobs": True, "return_token_ids": True}])
def test_a_stream_begins_with_the_role_and_has_the_same_text(live: Live, details: Any) -> None:
    told = dict.fromkeys(range(2), "")
    begun: set[int] = set()
    for chunk in chunks(live, "one", n=2, **details):
        assert chunk["object"] == "chat.completion.chunk"
        (choice,) = chunk["choices"]
        index, delta = choice["index"], choice["delta"]
        assert delta.get("role") == (None if index in begun else "assistant")
        begun.add(index)
        told[index] += delta.get("content", "")
    whole = live.chat("one", n=2, **details).json()["choices"]
    assert told == {choice["index"]: choice["message"]["content"] for choice in whole}


def test_logprobs_have_openai_s_shape(live: Live) -> None:
    (choice,) = live.chat("é", logprobs=True, top_logprobs=1).json()["choices"]
    (entry,) = choice["logprobs"]["content"]
    assert entry == {
        "token": "\ufffd",
        "logprob": -2.33,
        "bytes": [0xE9],
        "top_logprobs": [{"token": "\x00", "logprob": 0.0, "bytes": [0]}],
    }
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks(live, "ab", logprobs=True)]
    assert streamed[0] is None
    tokens = [entry["token"] for told in streamed[1:] for entry in told["content"]]
    assert tokens == ["a", "b"]


def test_ids_and_the_prompt_s_logprobs(live: Live) -> None:
    answer = live.chat("a", return_token_ids=True, prompt_logprobs=0).json()
    assert answer["prompt_token_ids"] == list(b"say:a")
    assert answer["choices"][0]["token_ids"] == [97]
    assert [*answer["prompt_logprobs"][-1]] == ["97"]
    first, *_ = chunks(live, "a", return_token_ids=True)
    assert first["prompt_token_ids"] == list(b"say:a")


def test_a_response_without_a_limit_ends_at_the_default(tmp_path: Path) -> None:
    with serving(template=template(tmp_path, "x"), default_max_tokens=7) as live:
        assert live.chat("x", ignore_eos=True).json()["usage"]["completion_tokens"] == 7
        for limit in ({"max_tokens": 2}, {"max_completion_tokens": 2}):
            assert live.chat("x", **limit).json()["usage"]["completion_tokens"] == 2


def test_text_parts_and_null_fields_are_accepted(live: Live) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    past = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "audio": None}
    body = {"messages": [past, {"role": "user", "content": parts, "name": "me"}]}
    answer = live.client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == "a\nb"


CALL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CACHED = {"cache_control": {"type": "ephemeral"}}
TEXT = {"type": "text", "text": "a"}


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "assistant", "content": None}, ""),
        ({"role": "assistant"}, ""),
        ({"role": "assistant", "content": None, "refusal": "no", "tool_calls": []}, ""),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "no"),
        ({"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}, "a"),
        ({"role": "user", "content": [TEXT | CACHED]}, "a"),
        ({"role": "user", "content": [TEXT | {"annotations": None, "image_url": None}]}, "a"),
        ({"role": "user", "content": [TEXT | CACHED, TEXT]} | CACHED, "a\na"),
        ({"role": "user", "content": []}, ""),
        ({"role": "user", "content": "a", "name": None, "tool_call_id": None, "id": "m1"}, "a"),
        ({"role": "user", "content": "a", "audio": None, "reasoning_content": "so"}, "a"),
    ],
)
def test_messages_as_clients_send_them(tmp_path: Path, message: Any, says: str) -> None:
    with serving(template=template(tmp_path, "say:<{{ messages[0].content }}>")) as live:
        body = {"messages": [message, {"role": "user", "content": "x"}]}
        response = live.client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["message"]["content"] == f"<{says}>"
        assert live.client.post("/tokenize", json=body).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [CALL], "tool_choice": "none"},
        {"functions": [CALL["function"]], "function_call": "none"},
        {"response_format": {"type": "text", "json_schema": None}},
        {"stream_options": {"include_usage": None}, "stream": True},
        {"tools": None, "tool_choice": None, "metadata": None},
    ],
    ids=repr,
)
def test_fields_without_effect_are_accepted(live: Live, fields: Any) -> None:
    assert live.chat("x", **fields).status_code == 200


def test_unknown_keys_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once each, none of those that are known to have no effect, and not without bound."""

    def send(live: Live, path: str, **more: Any) -> None:
        text = TEXT | CACHED | {"mark\n": 1}
        body = {"messages": [{"role": "user", "content": [text], "refusal": None} | CACHED | more]}
        assert live.client.post(path, json=body).status_code == 200

    with serving(template=template(tmp_path)) as live:
        for path in ("/v1/chat/completions", "/tokenize", "/v1/chat/completions"):
            send(live, path, id="m1", status="done", empty=None)
        told = [each.getMessage() for each in caplog.records if "ignored" in each.getMessage()]
        assert sorted(each.rpartition(" ")[2] for each in told) == ['"id"', '"mark\\n"', '"status"']
        caplog.clear()
        send(live, "/tokenize", **{f"key{place}": 1 for place in range(200)})
        assert sum("ignored" in each.getMessage() for each in caplog.records) == 61


def test_a_template_that_does_not_compile_stops_chats_alone(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with serving(template=find_template(None, tmp_path)) as live:
        for response in (
            live.chat("x"),
            live.client.post("/tokenize", json={"messages": [MESSAGE]}),
        ):
            message = refused(response)["message"]
            assert str(tmp_path / "chat_template.jinja") in message
            assert "is not a valid template: Expected an expression" in message
        assert live.complete(prompt="x").status_code == 200


@pytest.mark.parametrize("role", ["system", "developer", "tool", "ipython"])
def test_the_template_decides_which_roles_exist(tmp_path: Path, role: str) -> None:
    with serving(template=template(tmp_path, "say:{{ messages[0].role }}")) as live:
        body = {"messages": [{"role": role, "content": "x"}]}
        answer = live.client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == role


def test_variables_of_a_request_reach_the_template(live: Live) -> None:
    variables = {"tail": "!", "messages": [], "self": 1, "add_generation_prompt": 3}
    answer = live.chat("one", chat_template_kwargs=variables).json()
    assert answer["choices"][0]["message"]["content"] == "one!"


def test_neutral_values_are_accepted(live: Live) -> None:
    neutral = {"tools": [], "tool_choice": "none", "store": False, "metadata": {"a": "b"}}
    assert live.chat("one", **neutral, user="me", modalities=["text"]).status_code == 200


MESSAGE = {"role": "user", "content": "x"}


def part(each: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [each]}]}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"messages": None}, "messages", "required"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": "x"}, "messages", "list of objects"),
        ({"messages": ["x"]}, "messages", "messages[0] must be an object"),
        ({"messages": [{"role": "user"}]}, "messages", "messages[0].content is required; it must"),
        ({"messages": [MESSAGE, {"content": "x"}]}, "messages", "messages[1].role is required; it"),
        ({"messages": [MESSAGE | {"role": None}]}, "messages", "messages[0].role is required; it"),
        ({"messages": [MESSAGE | {"role": 1}]}, "messages", "role must be a string; it is 1"),
        ({"messages": [MESSAGE | {"tool_call_id": 1}]}, "messages", "tool_call_id must be a str"),
        ({"mesages": [MESSAGE]}, "mesages", 'no field "mesages"'),
        ({"messages": [MESSAGE | {"content": None}]}, "messages", "content is required"),
        ({"messages": [MESSAGE | {"function_call": {}}]}, "messages", "function_call is not supp"),
        (part({"type": "image_url"}), "messages", 'content[0].type must be "text", since this'),
        (part({"type": None, "text": "x"}), "messages", "takes text only; it is absent"),
        (part({"type": ["text"]}), "messages", "it is a list"),
        (part({"type": "text", "text": None}), "messages", "content[0].text is required"),
        (part({"type": "text", "text": 1}), "messages", "content[0].text must be a string"),
        (part("x"), "messages", 'content[0] must be {"type": "text"'),
        ({"tools": {}, "tool_choice": "none"}, "tools", "must be a list"),
        ({"messages": [MESSAGE | {"content": "\ud800"}]}, "messages", "lone surrogate"),
        ({"chat_template_kwargs": {"tail": "\ud800"}}, "chat_template_kwargs", "lone surrogate"),
        ({"functions": [{}]}, "functions", "tools have taken its place"),
        ({"chat_template": "x"}, "chat_template", "--chat-template"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs is true"),
        ({"logprobs": 1}, "logprobs", "true or false"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "from 1; it is -1"),
        ({"max_tokens": -1}, "max_tokens", "from 1; it is -1"),
        (
            {"max_completion_tokens": 3, "min_tokens": 4},
            "min_tokens",
            "to 3 (max_completion_tokens); it is 4",
        ),
        ({"max_tokens": "5"}, "max_tokens", 'from 1; it is "5"'),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "from 1; it is 0"),
        ({"max_tokens": 10**400}, "max_tokens", "at least 1 and at most 1000000; it is a number"),
        ({"max_completion_tokens": 10**7}, "max_completion_tokens", "at most 1000000"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ (1 and 2)"),
        ({"max_tokens": 0}, "max_tokens", "from 1"),
        ({"n": 129}, "n", "at most 128"),
        ({"prompt": "x"}, "prompt", "no field"),
        ({"model": "gpt-9"}, "model", "no model"),
    ],
    ids=repr,
)
def test_bad_fields_are_named(live: Live, fields: Any, param: str, says: str) -> None:
    raw = json.dumps({"messages": [MESSAGE]} | fields)
    response = live.client.post("/v1/chat/completions", content=raw)
    error = refused(response, 404 if param == "model" else 400)
    assert error["param"] == param
    assert says in error["message"]


def test_a_model_without_a_template_says_how_to_give_one(shared: Live) -> None:
    error = refused(shared.chat("hello"))
    assert "--chat-template" in error["message"]


def test_what_a_template_refuses_is_a_400(tmp_path: Path) -> None:
    source = "{{ raise_exception('roles must alternate') }}"
    with serving(template=template(tmp_path, source)) as live:
        assert "roles must alternate" in refused(live.chat("x"))["message"]


CHATML = """{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(template=template(tmp_path_factory.mktemp("chatml"), CHATML)) as live:
        yield live


ASKED = {"role": "user", "content": "Name it."}


def prompt_of(live: Live, messages: list[Any], **more: Any) -> str:
    """What the model is given."""
    body = {"messages": messages, "max_tokens": 1} | more
    response = live.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return live.engine.seen[-1].prompt


@pytest.mark.parametrize("more", [{}, {"add_generation_prompt": False}])
@pytest.mark.parametrize(
    ("content", "ends"), [("It is", "It is"), (" It is ", "It is"), ("|>It", "|>It"), ("?", "?")]
)
def test_an_answer_goes_on_with_the_last_message(
    chatml: Live, content: str, ends: str, more: Any
) -> None:
    """White space stays as far as the template keeps it; it trims contents."""
    messages = [ASKED, {"role": "assistant", "content": content}]
    prompt = prompt_of(chatml, messages, continue_final_message=True, **more)
    assert prompt == f"<|user|>Name it.\n<|assistant|>{ends}"
    body = {"messages": messages, "continue_final_message": True} | more
    tokens = chatml.client.post("/tokenize", json=body).json()["tokens"]
    assert bytes(tokens).decode() == prompt


def test_a_turn_goes_on_with_the_last_message(chatml: Live) -> None:
    session_id = chatml.opened("<|user|>Hi\n<|assistant|>Ho")
    messages = [ASKED, {"role": "assistant", "content": "It is"}]
    prompt = prompt_of(chatml, messages, continue_final_message=True, session_id=session_id)
    assert prompt == "\n<|user|>Name it.\n<|assistant|>It is"


def test_a_message_that_the_template_does_not_write_cannot_go_on(tmp_path: Path) -> None:
    source = "{{ messages[-1].content | upper }}"
    with serving(template=template(tmp_path, source)) as live:
        response = live.chat("abc", continue_final_message=True)
        assert response.status_code == 400
        assert "continued" in response.json()["error"]["message"]


def test_an_answer_is_new_or_goes_on(chatml: Live) -> None:
    body = {"continue_final_message": True, "add_generation_prompt": True}
    for path in ("/v1/chat/completions", "/tokenize"):
        response = chatml.client.post(path, json={"messages": [ASKED]} | body)
        assert response.json()["error"]["param"] == "add_generation_prompt"
