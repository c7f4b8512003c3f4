"""Structured output in the engine: masks of each choice, whatever else is in its batch."""

import json
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from benchmarks.structured_schemas import all_schemas
from cottention.engine import Engine, EngineConfig, FinishReason, SamplingParams
from cottention.engine.errors import ParameterError
from cottention.engine.outputs import Output
from cottention.engine.scheduling.client import Client
from cottention.engine.structured_output import TextStructure
from tests.engine.making import attention_folder

RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "kind": {"enum": ["red", "green"]},
        "sizes": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}


def structured(schema: Any = RECORD, **more: Any) -> SamplingParams:
    structure = TextStructure("json_schema", json.dumps(schema))
    return SamplingParams(**{"structured": structure, "max_tokens": 300, "seed": 1, **more})


def pattern(regex: str, **more: Any) -> SamplingParams:
    return SamplingParams(
        **{"structured": TextStructure("regex", regex), "max_tokens": 60, "seed": 1, **more}
    )


@pytest.fixture(scope="module")
def engine() -> Any:
    engine = Engine(attention_folder("cottention"), EngineConfig(max_slots=8))
    yield engine
    engine.close()


def run(engine: Engine) -> dict[tuple[str, int], list[Output]]:
    parts: dict[tuple[str, int], list[Output]] = {}
    while engine.has_work():
        for out in engine.step():
            parts.setdefault((out.request_id, out.choice), []).append(out)
    return parts


def ids_of(outputs: list[Output]) -> tuple[int, ...]:
    return tuple(token_id for out in outputs for token_id in out.token_ids)


def test_each_choice_is_complete_and_as_alone(engine: Engine) -> None:
    """A row's mask is its own: not that of the row beside it, nor of a free one."""
    wanted = [structured(n=3), structured(temperature=0, logprobs=2), pattern("[a-f]{3,9}")]
    free = SamplingParams(max_tokens=40, seed=4, ignore_eos=True)
    wanted = [free, *wanted, free]
    alone = [engine.generate(["x = "], params) for params in wanted]
    prompt = engine.tokenizer.encode("x = ")
    names = [engine.submit(prompt, params) for params in wanted]
    parts = run(engine)
    for name, params, completions in zip(names, wanted, alone, strict=True):
        for index, done in enumerate(completions):
            assert ids_of(parts[name, index]) == done.token_ids
            if params in wanted[1:3]:
                jsonschema.validate(json.loads(done.text), RECORD)
                assert done.finish_reason is FinishReason.STOP
    texts = {done.text for done in alone[1]}
    assert len(texts) == 3


def test_a_matcher_outlives_pauses_and_lost_slots() -> None:
    with_two = Engine(attention_folder("cottention"), EngineConfig(max_slots=1))
    expected = with_two.generate(["x = "], structured())[0].token_ids
    prompt = with_two.tokenizer.encode("x = ")
    name = with_two.submit(prompt, structured(), client=Client("one"))
    parts: list[Output] = []
    for step in range(400):
        if step == 3:
            with_two.pause(name)
        if step == 6:
            with_two.resume(name)
        if step == 10:  # another client's turn at the only slot
            other = SamplingParams(max_tokens=80, ignore_eos=True)
            with_two.submit(prompt, other, client=Client("two"))
        parts += [out for out in with_two.step() if out.request_id == name]
        if parts and parts[-1].finish_reason:
            break
    assert with_two.stats().num_preemptions > 0
    assert ids_of(parts) == expected
    with_two.close()


def test_matchers_end_with_their_choices(engine: Engine) -> None:
    prompt = engine.tokenizer.encode("x")
    ended = engine.submit(prompt, structured(n=2))
    cancelled = engine.submit(prompt, pattern("a*", max_tokens=1000, logit_bias={0: -100}))
    engine.step()
    choices = [
        choice
        for name in (ended, cancelled)
        for choice in engine._request_manager._requests[name].choices
    ]
    assert all(choice.matcher for choice in choices)
    engine.cancel(cancelled)
    run(engine)
    assert not any(choice.matcher for choice in choices)


def ends(engine: Engine, params: SamplingParams) -> tuple[str, FinishReason]:
    (done,) = engine.generate(["x"], params)
    return done.text, done.finish_reason


def test_beside_other_parameters(engine: Engine) -> None:
    assert ends(engine, pattern("[ab]{20}", max_tokens=3))[1] is FinishReason.LENGTH
    assert ends(engine, pattern("abc", min_tokens=50)) == ("abc", FinishReason.STOP)
    assert len(ends(engine, pattern("a*", min_tokens=9, max_tokens=9))[0]) >= 9
    assert ends(engine, pattern("abcd", stop=("c",))) == ("ab", FinishReason.STOP)
    x, y = (engine.tokenizer.encode(each)[0] for each in "xy")
    biased = pattern("[x-z]", logit_bias={y: 100.0, engine.tokenizer.encode("q")[0]: 100.0})
    assert ends(engine, biased) == ("y", FinishReason.STOP)
    with pytest.raises(ParameterError, match="structured_outputs") as caught:
        engine.generate(["x"], pattern("[0-9]", allowed_token_ids=(x,)))
    assert caught.value.param == "allowed_token_ids"
    with pytest.raises(ParameterError, match="not possible with structured_outputs"):
        pattern("a", ignore_eos=True)
    first = engine.submit(engine.tokenizer.encode("x"), pattern("xa", allowed_token_ids=(x,)))
    last = run(engine)[first, 0][-1]
    assert last.finish_reason is FinishReason.ERROR
    assert "forbidden" in str(last.error)


def test_a_grammar_that_explodes_ends_its_request_alone(engine: Engine) -> None:
    """It compiles; what it allows after some ids takes more than a step may."""
    chain = "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(40))
    text = f'start: r0\n{chain}\nr40: "a"'
    heavy = replace(pattern("a"), structured=TextStructure("grammar", text))
    prompt = engine.tokenizer.encode("x")
    good = engine.submit(prompt, pattern("[b-d]{8}"))
    bad = engine.submit(prompt, heavy)
    parts = run(engine)
    assert parts[bad, 0][-1].finish_reason is FinishReason.ERROR
    assert "the grammar cannot be followed" in str(parts[bad, 0][-1].error)
    assert parts[good, 0][-1].finish_reason is FinishReason.STOP


@pytest.mark.slow
def test_what_the_shipped_model_answers_validates() -> None:
    """A sample of the schemas; `python -m benchmarks.structured` asks for all of them."""
    engine = Engine(config=EngineConfig(max_slots=32))
    unfinished = []
    schemas = all_schemas()
    assert len(schemas) >= 300
    for name, schema in schemas[::10]:
        try:
            answers = engine.generate(["x = "], structured(schema, n=4, max_tokens=2048))
        except ParameterError:
            continue
        for answer in answers:
            if answer.finish_reason is FinishReason.STOP:
                jsonschema.validate(json.loads(answer.text), schema)
            else:
                unfinished.append(name)
    assert len(unfinished) <= 6
    engine.close()
