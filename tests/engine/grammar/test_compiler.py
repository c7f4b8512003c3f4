"""What grammars are refused, within which bounds, and which texts the accepted ones match."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from cottention.engine.errors import ParameterError
from cottention.engine.grammar import compiler as module
from cottention.engine.grammar.compiler import GrammarCompiler
from cottention.engine.grammar.trial import Limits
from cottention.engine.structured_output import (
    Call,
    CallStructure,
    StructuredOutput,
    TextStructure,
)
from tests.engine.making import small_tokenizer

EOS = 0
TOKENIZER = small_tokenizer()


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(TOKENIZER, [EOS], Limits(1.0, 256 * 1024**2), max_size=100_000)
    yield made
    made.close()


def schema(value: Any) -> TextStructure:
    return TextStructure("json_schema", json.dumps(value))


def is_complete(compiler: GrammarCompiler, structure: StructuredOutput, text: str) -> bool:
    """Whether a text may end here; the ids are not those of the tokenizer, but of its bytes."""
    native = compiler.compile(structure).matcher().native
    return native.consume_tokens(TOKENIZER.encode(text)) and native.is_accepting()


@pytest.mark.parametrize(
    ("structure", "texts", "others"),
    [
        (schema({"type": "integer"}), ["0", "-12"], ["01", "1.5", '"1"', "9" * 17]),
        (schema({"enum": ["a", 1]}), ['"a"', "1"], ["a"]),
        (schema({"const": {"a": [1, 2]}}), ['{"a": [1, 2]}'], ['{"a":[1,2]}', '{ "a": [1, 2]}']),
        (schema(True), ["null"], ["nul"]),
        (
            schema({"type": "string", "pattern": r'^[^"\\]+$'}),
            ['"a b"'],
            [r'"a\"b"', r'"a\\b"'],
        ),
        (TextStructure("regex", "[a-c]+"), ["a", "abc"], ["abd", ""]),
        (TextStructure("regex", "^ab?$"), ["a", "ab"], ["abb"]),
        (
            TextStructure("choice", json.dumps(["a.c", "(x|y)*", 'é/"\n'])),
            ["a.c", "(x|y)*", 'é/"\n'],
            ["abc", "x", "a.", ""],
        ),
        (TextStructure("grammar", 'start: "a" start | "b"'), ["b", "aab"], ["a"]),
        (TextStructure("grammar", 'root ::= "x" [0-9]+'), ["x1"], ["x"]),
        (
            TextStructure("json_schema", '{"items": {"type": "null"}, "type": "array"}', "[ ]*"),
            ["[null,null]", "[ null ,null ]"],
            ["[null,\nnull]"],
        ),
    ],
)
def test_what_is_matched(
    compiler: GrammarCompiler, structure: TextStructure, texts: list[str], others: list[str]
) -> None:
    assert [each for each in texts if not is_complete(compiler, structure, each)] == []
    assert [each for each in others if is_complete(compiler, structure, each)] == []


def test_options_in_a_schema_do_not_change_how_it_is_followed(compiler: GrammarCompiler) -> None:
    lenient = schema({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}})
    with pytest.raises(ParameterError, match="uniqueItems"):
        compiler.compile(lenient)


A = {"type": "object", "properties": {"a": {"type": "null"}}}
B = {"type": "object", "properties": {"b": {"type": "null"}}}


@pytest.mark.parametrize(
    ("value", "closed", "opened"),
    [
        (A, '{"a": null}', '{"x": 1}'),
        ({"type": "array", "items": A}, "[{}]", '[{"x": 1}]'),
        ({"anyOf": [A, {"$ref": "#/$defs/b"}], "$defs": {"b": B}}, '{"b": null}', '{"x": 1}'),
        (A | {"additionalProperties": {"type": "integer"}}, '{"x": 1}', '{"x": true}'),
        ({"type": "object"}, '{"x": 1}', '{"x": ]'),
        ({"allOf": [A, B]}, '{"a": null, "b": null}', '{"a": 1}'),
        ({"allOf": [{"$ref": "#/$defs/a"}, B], "$defs": {"a": A}}, '{"a": null, "b": null}', "1"),
    ],
)
def test_an_object_has_the_properties_that_its_schema_names(
    compiler: GrammarCompiler, value: Any, closed: str, opened: str
) -> None:
    """Any others would be valid, and small models write them without end."""
    assert is_complete(compiler, schema(value), closed)
    assert not is_complete(compiler, schema(value), opened)


@pytest.mark.parametrize(
    ("value", "texts", "others"),
    [
        ({"type": "number"}, ["-1.5", "0.123456789", "9007199254740991"], ["0.1234567891", "1e5"]),
        ({"type": ["integer", "null"]}, ["null", "7"], ["9" * 17]),
        ({"type": "integer", "multipleOf": 2}, ["10"], ["2" * 17]),
        ({"type": "number", "minimum": 1e-12, "maximum": 1e-11}, ["0.000000000005"], ["0"]),
        ({"type": "integer", "minimum": 2**53}, [str(2**53), "9" * 17], ["1"]),
        ({"type": "string", "pattern": "z$"}, ['"az"'], [f'"{"a" * 1024}z"']),
        ({"type": "string", "pattern": "^a{1100}$"}, [f'"{"a" * 1100}"'], ['"a"']),
        ({"type": "string", "format": "email"}, ['"a@b.cd"'], [f'"{"a" * 256}@b.cd"']),
    ],
)
def test_numbers_and_patterns_have_a_greatest_length(
    compiler: GrammarCompiler, value: Any, texts: list[str], others: list[str]
) -> None:
    """Where that leaves no text, there is none."""
    assert [each for each in texts if not is_complete(compiler, schema(value), each)] == []
    assert [each for each in others if is_complete(compiler, schema(value), each)] == []


def test_branches_that_exclude_each_other_only_once_narrowed_are_refused(
    compiler: GrammarCompiler,
) -> None:
    """`{"b": null}` is valid for both as they were given, and so not for their `oneOf`."""
    with pytest.raises(ParameterError, match="oneOf"):
        compiler.compile(schema({"oneOf": [A, B | {"required": ["b"]}]}))


CHAIN = "\n".join(f'R{i}: "a" R{i + 1}' for i in range(4000))


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        (schema({"type": "integer", "multipleOf": 99_999_989}), "more than 1 seconds"),
        (TextStructure("grammar", f'start: R0\n{CHAIN}\nR4000: "a"'), "nested too deeply"),
        (schema({"$ref": "#"}), "no text matches it"),
        (schema({"$ref": "https://example.com/x.json"}), "not present"),
        (schema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (schema({"not": {"type": "null"}}), "Unimplemented"),
        (TextStructure("regex", "(" * 20_000 + "a" + ")" * 20_000), "is not valid: .*nest"),
        (TextStructure("regex", "(a"), "followed: the regular expression is not valid: unclosed"),
        (TextStructure("grammar", "start: missing"), "unknown name"),
        (TextStructure("grammar", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000), "too deeply"),
        (TextStructure("regex", "a" * 100_001), "at most 100000 characters"),
    ],
)
def test_what_is_refused_names_its_field(
    compiler: GrammarCompiler, structure: TextStructure, reason: str
) -> None:
    """Some of these would end the server's process, or hold one of its threads for minutes."""
    with pytest.raises(ParameterError, match=reason) as caught:
        compiler.compile(structure)
    assert caught.value.param == "structured_outputs"
    assert is_complete(compiler, TextStructure("regex", "ok"), "ok")  # and the next is tried


def test_a_model_without_an_end_of_text_follows_none() -> None:
    compiler = GrammarCompiler(TOKENIZER, [], Limits(1.0, 2**28), max_size=100)
    with pytest.raises(ParameterError, match="no end-of-text id"):
        compiler.compile(TextStructure("regex", "a"))


def test_the_grammars_used_last_are_kept(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_KEPT_SIZE", 20)
    first, second, third = (TextStructure("regex", letter * 10) for letter in "abc")
    kept = compiler.compile(first)
    compiler.compile(second)
    assert compiler.compile(TextStructure("regex", "a" * 10, param="other")) is kept
    compiler.compile(third)
    assert compiler.compile(first) is kept
    assert {second, third} & compiler._kept.keys() == {third}


# Calls

SCHEMA = json.dumps({"type": "object", "properties": {"x": {"type": "integer"}}})
TAGGED = CallStructure(
    (Call('{"name": "f", "arguments": ', SCHEMA, "}</call>"), Call("g", SCHEMA, "</call>")),
    opening="<call>",
    separator="\n<call>",
)
ONE = '<call>{"name": "f", "arguments": {"x": 1}}</call>'
TWO = f'{ONE}\n<call>g{{"x": 2}}</call>'


def changed(structure: CallStructure, **changes: Any) -> CallStructure:
    fields = {name: getattr(structure, name) for name in CallStructure.__slots__}
    return CallStructure(**fields | changes)


@pytest.mark.parametrize(
    ("structure", "texts", "others"),
    [
        (TAGGED, [ONE, TWO], ["", "text", f"text {ONE}", f"{ONE} text", ONE.replace("1", "y")]),
        (changed(TAGGED, is_parallel=False), [ONE], [TWO]),
        (
            changed(TAGGED, trigger="<call>", follows_text=True),
            ["", "text", "a <cal", ONE, f"text\n{TWO}"],
            ["text <call>", f"{ONE} text", "<call>h"],
        ),
        (
            CallStructure(
                TAGGED.calls, opening="[", separator=", ", closing="]", trigger='[{"name'
            ),
            ["", "text", "[", '[{"nam', f"text [{TWO}", '[{"name": "f", "arguments": {}}</call>]'],
            ['[{"name": "h"', '[{"name": "f", "arguments": {}}</call>'],
        ),
    ],
)
def test_calls(
    compiler: GrammarCompiler, structure: CallStructure, texts: list[str], others: list[str]
) -> None:
    """A text that begins a call ends with it, and the rest of a text is free."""
    assert [each for each in texts if not is_complete(compiler, structure, each)] == []
    assert [each for each in others if is_complete(compiler, structure, each)] == []


def test_a_special_token_that_a_format_spells_is_the_token() -> None:
    """Spelled in ordinary ids it would be text, which the model was not trained to answer with."""
    (spelled,) = (each.content for each in TOKENIZER.added_tokens.values() if each.special)
    (special_id,) = TOKENIZER.added_tokens
    structure = CallStructure(
        (Call("", SCHEMA, ""),), opening=spelled, trigger=spelled, follows_text=True
    )
    with_end = GrammarCompiler(TOKENIZER, [EOS + 5], Limits(60.0, 2**28), max_size=1000)
    native = with_end.compile(structure).matcher().native
    assert native.consume_tokens([*TOKENIZER.encode("text "), special_id])
    assert not native.is_accepting()
    assert native.consume_tokens(TOKENIZER.encode("{}"))
    assert native.is_accepting()
    with_end.close()
