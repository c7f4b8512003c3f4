"""Structured output over HTTP: what the engine is asked for, and what a real one answers."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from cottention.engine.structured_output import TextStructure
from cottention.server.generation.chat_template import ChatTemplate
from cottention.server.generation.template_environment import compile_template
from tests.engine.making import attention_folder
from tests.server.live import Live, serving

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["n"],
    "additionalProperties": False,
}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def json_schema(schema: Any = SCHEMA, **more: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("json_schema", '{"type": "object"}')),
        ({"response_format": json_schema(strict=True)}, ("json_schema", json.dumps(SCHEMA))),
        ({"guided_json": SCHEMA}, ("json_schema", json.dumps(SCHEMA))),
        ({"guided_json": '{"type":"null"}'}, ("json_schema", '{"type": "null"}')),
        ({"guided_regex": "a+"}, ("regex", "a+")),
        ({"guided_choice": ["a", "é"]}, ("choice", '["a", "\\u00e9"]')),
        ({"guided_grammar": 'start: "a"'}, ("grammar", 'start: "a"')),
        ({"structured_outputs": {"regex": "a+", "json": None}}, ("regex", "a+")),
        ({"structured_outputs": {"json_object": True}}, ("json_schema", '{"type": "object"}')),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": " *"}},
            ("json_schema", "{}", " *"),
        ),
    ],
)
def test_what_the_engine_is_asked_for(shared: Live, fields: Any, expected: Any) -> None:
    assert shared.complete(prompt="say:x", **fields).status_code == 200
    found = shared.engine.seen[-1].params.structured
    assert found == (None if expected is None else TextStructure(*expected))
    assert found is None or found.param == next(iter(fields))


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A server of the real engine."""
    engine = Engine(attention_folder("cottention"), EngineConfig(max_slots=4, grammar_seconds=1))
    with serving(engine, ChatTemplate(compile_template(TEMPLATE), (), {})) as live:
        yield live


def test_answers_follow_a_schema_everywhere(live: Live) -> None:
    """Completions, chats, streams and turns of sessions have one field and one meaning."""
    asked = {"response_format": json_schema(), "max_tokens": 60, "seed": 3}
    texts = [live.complete(prompt="x", **asked).json()["choices"][0]["text"]]
    texts += [each["message"]["content"] for each in live.chat("x", n=2, **asked).json()["choices"]]
    events = live.events(prompt="x", **asked)[:-1]
    texts.append("".join(event["choices"][0]["text"] for event in events))
    session_id = live.opened("x")
    turns = [live.chat("y", session_id=session_id, **asked) for _ in range(2)]
    texts += [turn.json()["choices"][0]["message"]["content"] for turn in turns]
    for text in texts:
        assert json.loads(text).keys() == {"n"}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "integer", "multipleOf": 99_999_989}, "takes more than 1 seconds"),
        ({"type": "nothing"}, "cannot be followed"),
        ({"enum": ["x" * 70_000]}, "--max-grammar-size"),
    ],
)
def test_a_schema_that_is_refused_is_a_400(live: Live, schema: Any, reason: str) -> None:
    session_id = live.opened("x")
    for more in ({"stream": True}, {"session_id": session_id}):
        answer = live.complete(prompt="x", response_format=json_schema(schema), **more)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == "response_format"
        assert reason in error["message"]
