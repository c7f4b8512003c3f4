"""What the engine itself says, without HTTP; run with the project's own environment.

Reads a JSON list of requests from standard input and writes a list of answers: for {"prompt",
"params"} the text, for {"context", "continuation"} the sum of log-probabilities and whether each
token was the likeliest.
"""

import json
import sys
from typing import Any

from cottention.engine import Engine, EngineConfig, Output, SamplingParams


def main() -> None:
    engine = Engine(sys.argv[1], EngineConfig(max_slots=4))
    requests = json.load(sys.stdin)
    json.dump([answer(engine, request) for request in requests], sys.stdout)


def answer(engine: Engine, request: dict[str, Any]) -> Any:
    if "context" in request:
        return score(engine, request["context"], request["continuation"])
    params = {name: as_tuple(value) for name, value in request["params"].items()}
    (completion,) = engine.generate([request["prompt"]], SamplingParams(**params))
    return completion.text


def score(engine: Engine, context: str, continuation: str) -> tuple[float, bool]:
    """As a harness does: ids of the whole, of which those after the context's count."""
    ids = engine.tokenizer.encode(context + continuation)
    start = len(engine.tokenizer.encode(context))
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    (first, *_) = engine.stream(ids, params)
    assert isinstance(first, Output)
    assert first.prompt_logprobs is not None
    entries = [entry for entry in first.prompt_logprobs[start:] if entry is not None]
    is_greedy = all(entry.logprob == entry.top[0][1] for entry in entries)
    return sum(entry.logprob for entry in entries), is_greedy


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
