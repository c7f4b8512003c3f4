"""Structured output over HTTP: what the engine is asked for, and what a real one answers."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from cottention.engine.structured_output import TextStructure
from cottention.server.generation.chat_template import ChatTemplate
from cottention.server.generation.template_environment import compile_template
from cottention.server.limits.api_keys import owner_id
from tests.engine.making import attention_folder
from tests.server.fake_engine import FakeEngine
from tests.server.live import PATIENCE, Live, eventually, serving

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


def test_a_key_s_heavy_grammars_do_not_keep_others_out() -> None:
    """They are compiled in threads that read all bodies: as many as there are would block these."""
    engine, may_end = FakeEngine(), threading.Event()
    began: list[str] = []
    submit = engine.submit

    def submitting(prompt_ids: Any, params: Any, **more: Any) -> str:
        if params.structured is not None and not engine.has_grammar(params.structured):
            began.append(more["client"].id)
            assert may_end.wait(PATIENCE)
        return submit(prompt_ids, params, **more)

    setattr(engine, "submit", submitting)  # noqa: B010
    engine.grammars.add(TextStructure("regex", "a+"))
    keys = ("of one", "of another")
    owners = [owner_id(key) for key in keys]
    with serving(engine, api_key=keys) as live, ThreadPoolExecutor(64) as pool:

        def ask(key: str, **body: Any) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            body = {"prompt": "x", "max_tokens": 2} | body
            return live.client.post("/v1/completions", json=body, headers=headers).status_code

        heavy = [pool.submit(ask, keys[0], guided_regex=f"b{{{n}}}") for n in range(1, 49)]
        eventually(lambda: len(began) == 1)
        assert ask(keys[1], prompt="long " * 10_000) == 200  # it is read in a thread
        assert ask(keys[1], guided_regex="a+") == 200
        light = pool.submit(ask, keys[1], guided_regex="c+")
        eventually(lambda: len(live.async_engine._grammar_turns._waiting) == 2)
        may_end.set()
        assert {each.result() for each in [*heavy, light]} == {200}
    assert owners[1] in began[:3], "its turn comes after one or two of the other's"
