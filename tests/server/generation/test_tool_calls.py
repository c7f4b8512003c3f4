"""Formats of calls: what a template shows, what is read back piece by piece, what is rendered."""

import json
from pathlib import Path
from typing import Any

import pytest

from cottention.server.generation.chat_template import ChatTemplate, find_template
from cottention.server.generation.tools.calls import CallFormat, CallReader
from cottention.server.generation.tools.formats import (
    HERMES,
    LLAMA_3,
    MISTRAL,
    PLAIN_JSON,
    ToolFormat,
    as_text,
    instructed,
)
from cottention.server.schemas.tools import CallOptions, Tool

FORMATS = (HERMES, LLAMA_3, MISTRAL, PLAIN_JSON)
TOOLS = tuple(
    Tool(name, '{"type": "object"}', {"type": "function", "function": {"name": name}})
    for name in ("find", "find_all")
)
ARGUMENTS = ('{"a": "x}\\"{", "b": [{"c": 1}]}', "{}")


def reader(tool_format: ToolFormat, *, is_required: bool) -> CallReader:
    return CallReader(CallFormat(tool_format, CallOptions(TOOLS, is_required, True)))


def written(tool_format: ToolFormat) -> str:
    calls = [
        {"function": {"name": tool.name, "arguments": arguments}}
        for tool, arguments in zip(TOOLS, ARGUMENTS, strict=True)
    ]
    return tool_format.written(calls)


def joined(deltas: list[dict[str, Any]]) -> tuple[str, list[list[str]]]:
    """Content, and names and arguments of calls, as a client puts a stream together."""
    content, calls = "", []
    for delta in deltas:
        content += delta.get("content", "")
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls.append([part["function"]["name"], ""])
            assert part["index"] == len(calls) - 1
            calls[-1][1] += part["function"]["arguments"]
    return content, calls


@pytest.mark.parametrize("is_required", [True, False])
@pytest.mark.parametrize("tool_format", FORMATS, ids=lambda each: each.name)
def test_calls_are_read_however_they_are_cut(tool_format: ToolFormat, is_required: bool) -> None:
    before = "see: <tool\n" if tool_format.follows_text and not is_required else ""
    text = before + written(tool_format)
    expected = before, [[t.name, a] for t, a in zip(TOOLS, ARGUMENTS, strict=True)]
    for width in (1, 7, len(text)):
        one = reader(tool_format, is_required=is_required)
        deltas = [
            delta
            for place in range(0, len(text), width)
            for delta in one.read(text[place : place + width], is_last=place + width >= len(text))
        ]
        assert joined(deltas) == expected
        assert one.is_complete
        assert (one.content, [[each.name, each.arguments] for each in one.calls]) == expected
    assert len({call.id for call in one.calls}) == 2


@pytest.mark.parametrize("tool_format", FORMATS, ids=lambda each: each.name)
@pytest.mark.parametrize("text", ["", "a text", '{"nam', '{"tool', "<tool_ca", "say [TOOL_CALLS"])
def test_text_alone_is_content(tool_format: ToolFormat, text: str) -> None:
    """What might have begun a call is told at the end."""
    one = reader(tool_format, is_required=False)
    deltas = [delta for letter in text for delta in one.read(letter, is_last=False)]
    deltas += one.read("", is_last=True)
    assert joined(deltas) == (text, [])
    assert not one.is_complete


@pytest.mark.parametrize("tool_format", FORMATS, ids=lambda each: each.name)
def test_a_call_that_is_cut_is_told_as_far_as_it_goes(tool_format: ToolFormat) -> None:
    text = written(tool_format)
    one = reader(tool_format, is_required=True)
    deltas = one.read(text[: text.index('"x}') + 2], is_last=True)
    assert joined(deltas) == ("", [["find", '{"a": "x']])
    assert not one.is_complete


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% if tools %}<tool_call>{{ tools }}</tool_call>{% endif %}", HERMES),
        ("{% for t in tools %}[AVAILABLE_TOOLS]{% endfor %}{{ '[TOOL_CALLS]' }}", MISTRAL),
        ("{{ tools }}{% if message.role == 'ipython' %}{% endif %}", LLAMA_3),
        ("{{ tools }}", PLAIN_JSON),
        ("<tool_call> is an example {{ messages }}", PLAIN_JSON),
    ],
)
def test_the_template_tells_the_format(source: str, expected: ToolFormat, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(source)
    template = find_template(None, tmp_path)
    assert isinstance(template, ChatTemplate)
    assert template.tool_format is expected
    assert template.has_tools == ("{{ tools" in source or "tools %}" in source)


CALLS = [{"id": "1", "type": "function", "function": {"name": "find", "arguments": {"a": 1}}}]


def test_a_template_without_tools_gets_texts() -> None:
    messages = [
        {"role": "system", "content": "Be good."},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "Wait.", "tool_calls": CALLS},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "tool", "content": "3", "tool_call_id": "unknown"},
    ]
    system, *others = instructed(as_text(messages), TOOLS)
    assert system["content"].startswith("Be good.\n\nYou can call")
    assert json.dumps({"name": "find_all"}) in system["content"]
    assert others == [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "content": 'Wait.\n{"tool_calls": [{"name": "find", "arguments": {"a": 1}}]}',
        },
        {"role": "user", "content": "Result of find: 2\n3"},
    ]
    assert instructed(messages[1:2], TOOLS)[0]["role"] == "system"
