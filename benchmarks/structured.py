"""Structured output: what constrained streams cost beside free ones, and whether answers validate.

The streams of both kinds run by turns, so that other load affects both alike. The answers are those
of the model that ships here to every schema of `structured_schemas.py`: an answer that ends by
itself has to validate, and most have to end within 2,048 tokens.
"""

import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator

import jsonschema

from benchmarks.common import Report, percentile, run, show
from benchmarks.structured_schemas import NamedSchema, all_schemas
from cottention.engine import Engine, EngineConfig, FinishReason, SamplingParams
from cottention.engine.errors import ParameterError
from cottention.engine.outputs import Completion
from cottention.engine.structured_output import TextStructure

STREAMS = 64
STEPS = 8
PROMPT = "data = "
MAX_TOKENS = 2048
SEEDS = 20

RECORDS = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "count": {"type": "integer", "minimum": 0, "maximum": 1000},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
            "score": {"type": "number"},
            "ok": {"type": "boolean"},
        },
        "required": ["name", "count", "tags", "score", "ok"],
        "additionalProperties": False,
    },
}
"""Of the streams that are timed: it does not end before they do."""


def measure(quick: bool) -> Report:
    """Tokens per second of constrained streams, and the answers to every schema."""
    speed = _speed(num_turns=20 if quick else 100)
    show("64 streams, free and constrained by turns", [speed])
    engine = Engine(config=EngineConfig(max_slots=STREAMS))
    schemas = all_schemas()[:: 10 if quick else 1]
    answers = _answers(engine, schemas, num_seeds=2 if quick else SEEDS)
    engine.close()
    return {"structured_speed": speed, "structured_answers": answers}


def _json(schema: object) -> TextStructure:
    return TextStructure("json_schema", json.dumps(schema), param="response_format")


def _speed(num_turns: int) -> Report:
    """Times of some steps of 64 streams of either kind, by turns: medians, and ratios of pairs."""
    engines = {"free": _busy_engine(None), "constrained": _busy_engine(_json(RECORDS))}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(num_turns):
        for name in sorted(engines, reverse=turn % 2 == 0):
            start = time.perf_counter()
            num_tokens = sum(
                len(out.token_ids) for _ in range(STEPS) for out in engines[name].step()
            )
            seconds[name].append((time.perf_counter() - start) / num_tokens)
    for engine in engines.values():
        engine.close()
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    return {
        "free tok/s": 1 / statistics.median(seconds["free"]),
        "constrained tok/s": 1 / statistics.median(seconds["constrained"]),
        "ratio": statistics.median(ratios),
        "ratio p10": percentile(ratios, 10),
        "ratio p90": percentile(ratios, 90),
    }


def _busy_engine(structure: TextStructure | None) -> Engine:
    """An engine with as many streams as slots, none of which ends before the turns do."""
    engine = Engine(config=EngineConfig(max_slots=STREAMS))
    params = SamplingParams(
        max_tokens=MAX_TOKENS, seed=1, ignore_eos=structure is None, structured=structure
    )
    for place in range(STREAMS):
        engine.submit(engine.tokenizer.encode(f"{PROMPT}{place}"), params)
    for _ in range(STEPS):
        engine.step()
    return engine


def _answers(engine: Engine, schemas: list[NamedSchema], num_seeds: int) -> Report:
    """Ask for all schemas, as many at a time as there are slots; prints what is refused."""
    refused = {}
    asked = []
    for schema in schemas:
        try:
            params = SamplingParams(structured=_json(schema.schema), max_tokens=1)
            engine.generate([PROMPT], params)
            asked.append(schema)
        except ParameterError as error:
            refused[schema.name] = str(error)
    counts: dict[str, Counter[str]] = {}
    invalid: list[str] = []
    unended: Counter[str] = Counter()
    lengths: list[float] = []
    for schema, answer in _generated(engine, asked, num_seeds):
        count = counts.setdefault(schema.name.rsplit("-", 1)[0], Counter())
        count["answers"] += 1
        lengths.append(len(answer.token_ids))
        if answer.finish_reason is not FinishReason.STOP:
            unended[schema.name] += 1
            continue
        count["ended"] += 1
        try:
            jsonschema.validate(json.loads(answer.text), schema.schema)
            count["valid"] += 1
        except (ValueError, jsonschema.ValidationError):
            invalid.append(f"{schema.name}: {answer.text[:100]}")
    total = sum(counts.values(), Counter())
    rows = [
        {
            "schemas": name,
            "answers": count["answers"],
            "ended": count["ended"],
            "ended %": 100 * count["ended"] / count["answers"],
            "valid of these": count["valid"],
        }
        for name, count in [*counts.items(), ("all", total)]
    ]
    show(f"Answers of at most {MAX_TOKENS} tokens", rows)
    print(f"\n{len(asked)} of {len(schemas)} schemas are accepted")
    for name, reason in refused.items():
        print(f"  {name} is refused: {reason}")
    for name, num in unended.most_common(20):
        print(f"  {name}: {num} of {num_seeds} answers do not end")
    for text in invalid:
        print(f"  INVALID {text}")
    assert not invalid, "an answer that ended does not validate"
    return {
        "accepted": len(asked),
        "schemas": len(schemas),
        "refused": refused,
        "groups": rows,
        "median tokens": statistics.median(lengths),
    }


def _generated(
    engine: Engine, schemas: list[NamedSchema], num_seeds: int
) -> Iterator[tuple[NamedSchema, Completion]]:
    """Answers with seeds 0, 1, ...; a new request starts as soon as one has ended."""
    waiting = [(schema, seed) for schema in schemas for seed in range(num_seeds)][::-1]
    running: dict[str, NamedSchema] = {}
    outputs: dict[str, list] = {}
    prompt = engine.tokenizer.encode(PROMPT)
    while waiting or running:
        while waiting and len(running) < 2 * STREAMS:
            schema, seed = waiting.pop()
            structure = _json(schema.schema)
            params = SamplingParams(structured=structure, max_tokens=MAX_TOKENS, seed=seed)
            running[engine.submit(prompt, params)] = schema
        for output in engine.step():
            parts = outputs.setdefault(output.request_id, [])
            parts.append(output)
            if output.finish_reason is not None:
                yield running.pop(output.request_id), Completion.of(outputs.pop(output.request_id))


if __name__ == "__main__":
    run(__doc__, measure)
