"""Tools of chats over HTTP: prompts, grammars, answers, streams; real calls of a real engine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from cottention.engine.structured_output import CallStructure
from cottention.server.generation.chat_template import ChatTemplate, find_template
from tests.engine.making import attention_folder
from tests.server.live import Live, serving

ARGUMENTS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": ARGUMENTS}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time."}}
TOOLS = [WEATHER, CLOCK]

HERMES = """\
{%- for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}
{%- for m in messages %}{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}
{%- if m.tool_call_id %}({{ m.tool_call_id }}){% endif %}{% endfor %}"""


def hermes(folder: Path) -> ChatTemplate:
    (folder / "chat_template.jinja").write_text(HERMES)
    template = find_template(None, folder)
    assert isinstance(template, ChatTemplate)
    return template


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server whose model says what the user said, where no tools are shown."""
    with serving(template=hermes(tmp_path_factory.mktemp("model"))) as live:
        yield live


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    engine = Engine(attention_folder("cottention"), EngineConfig(max_slots=4))
    with serving(engine, hermes(tmp_path_factory.mktemp("model"))) as live:
        yield live


def asked_of(live: Live) -> Any:
    return live.engine.seen[-1]


def test_what_a_choice_of_tools_asks_of_the_engine(live: Live) -> None:
    names = {
        "auto": ["weather", "clock"],
        "required": ["weather", "clock"],
        "clock": ["clock"],
    }
    for choice, expected in names.items():
        named = {"type": "function", "function": {"name": choice}}
        sent = named if choice == "clock" else choice
        assert live.chat("say:x", tools=TOOLS, tool_choice=sent).status_code == 200
        structure = asked_of(live).params.structured
        assert isinstance(structure, CallStructure)
        assert [json.loads(call.begin[1:] + "{}}")["name"] for call in structure.calls] == expected
        assert structure.trigger == ("<tool_call>" if choice == "auto" else "")
        assert structure.is_parallel == (choice != "clock")
        assert asked_of(live).prompt.startswith("".join(f"[{name}]" for name in expected))
    live.chat("say:x", tools=TOOLS, parallel_tool_calls=False)
    assert not asked_of(live).params.structured.is_parallel


@pytest.mark.parametrize("more", [{"tool_choice": "none"}, {"tools": []}, {"tools": None}])
def test_without_tools_an_answer_is_text(live: Live, more: Any) -> None:
    answer = live.chat("say:<tool_call>", **({"tools": TOOLS} | more)).json()["choices"][0]
    assert answer["message"]["content"] == "<tool_call>"
    assert answer["message"]["tool_calls"] is None
    assert answer["finish_reason"] == "stop"
    assert asked_of(live).params.structured is None
    assert asked_of(live).prompt == "say:<tool_call>"


def test_earlier_calls_reach_the_template(live: Live) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "clock", "arguments": '{"zone":"x"}'},
    }
    messages = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "12"}]},
    ]
    answer = live.client.post("/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 200, answer.text
    function = '{"name": "clock", "arguments": {"zone": "x"}}'
    assert asked_of(live).prompt == f"u<tool_call>\n{function}\n</tool_call>12(call_1)"


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"tools": [{}]}, "tools", "tools[0] must be"),
        ({"tools": [WEATHER, WEATHER]}, "tools", '"weather" twice'),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "letters"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice", '"none", "auto"'),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "one of tools (weather, clock)",
        ),
        ({"tools": TOOLS, "guided_regex": "a"}, "guided_regex", "not possible with tools"),
        ({"tools": TOOLS, "ignore_eos": True}, "ignore_eos", "not possible with tools"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "x"}}]}]},
            "messages",
            "tool_calls[0] must be",
        ),
    ],
)
def test_what_is_refused(live: Live, fields: Any, param: str, reason: str) -> None:
    answer = live.chat("x", **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert reason in answer.json()["error"]["message"]


def test_a_schema_of_arguments_that_is_refused_names_the_tools(real: Live) -> None:
    broken = {"name": "x", "parameters": {"type": "object", "not": {}}}
    answer = real.chat("x", tools=[{"type": "function", "function": broken}])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tools"


def test_a_real_answer_calls_with_valid_arguments(real: Live) -> None:
    """Whole, streamed and in a session."""
    asked = {"tools": TOOLS[:1], "tool_choice": "required", "max_tokens": 800, "seed": 2}
    whole = real.chat("x", **asked).json()["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] is None
    calls = whole["message"]["tool_calls"]
    for call in calls:
        assert call["function"]["name"] == "weather"
        jsonschema.validate(json.loads(call["function"]["arguments"]), ARGUMENTS)

    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, **asked}
    response = real.client.post("/v1/chat/completions", json=body)
    events = [json.loads(line[6:]) for line in response.text.split("\n") if "chunk" in line]
    deltas = [event["choices"][0]["delta"] for event in events]
    told: dict[int, str] = {}
    for part in (part for delta in deltas for part in delta.get("tool_calls", ())):
        told[part["index"]] = told.get(part["index"], "") + part["function"]["arguments"]
    assert [*told.values()] == [call["function"]["arguments"] for call in calls]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"

    in_session = real.chat("x", session_id=real.opened(), **asked).json()["choices"][0]
    assert [call["function"] for call in in_session["message"]["tool_calls"]] == [
        call["function"] for call in calls
    ]


def test_a_free_answer_may_be_cut_before_it_calls(real: Live) -> None:
    answer = real.chat("x", tools=TOOLS, max_tokens=5, seed=1).json()["choices"][0]
    assert answer["finish_reason"] == "length"
    assert answer["message"]["content"]
