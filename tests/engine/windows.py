"""Small models whose window is a few tokens, and what they should say by the plain definition."""

import functools
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine import Engine, EngineConfig, Output, SamplingParams
from engine.outputs import TokenLogprob
from engine.renewal import Grid
from engine.session_state import SessionState

_MODEL = Path(__file__).parents[1] / "data" / "golden" / "cottention-gptj"
_HOLD = tempfile.TemporaryDirectory(prefix="cottention-windows-")
PARAMS = SamplingParams(ignore_eos=True, seed=7, logprobs=3)
Told = tuple[int, TokenLogprob]


@functools.cache
def folder_of(window: int) -> Path:
    """The small model, as if it had been trained on `window` tokens."""
    target = Path(_HOLD.name) / str(window)
    shutil.copytree(_MODEL, target, ignore=shutil.ignore_patterns("expected.*"))
    config = json.loads((target / "config.json").read_text()) | {"n_positions": window}
    (target / "config.json").write_text(json.dumps(config))
    return target


def engine_of(window: int, **settings: Any) -> Engine:
    return Engine(folder_of(window), EngineConfig(**{"max_slots": 4, **settings}))


@functools.cache
def exact_engine() -> Engine:
    """Knows one arithmetic only: ids from the start of a sequence, nothing forgotten."""
    return engine_of(64, context_policy="exact", prefix_cache_bytes=0, max_slots=64)


def told(outputs: Sequence[Output], name: str, choice: int = 0) -> list[Told]:
    """What one request drew, and how likely the model held it and its rivals."""
    own = [out for out in outputs if out.request_id == name and out.choice == choice]
    return [pair for out in own for pair in zip(out.token_ids, out.logprobs, strict=True)]


def drain(engine: Engine) -> list[Output]:
    outputs: list[Output] = []
    while engine.has_work():
        outputs += engine.step()
    assert engine.pool.num_free == engine.pool.num_slots
    return outputs


def say(engine: Engine, ids: Sequence[int], num: int, **more: Any) -> list[Told]:
    """One request to its end."""
    name = engine.submit(ids, replace(PARAMS, max_tokens=num), **more)
    return told(drain(engine), name)


def turn(
    engine: Engine, start: SessionState, ids: Sequence[int], num: int, **params: Any
) -> tuple[SessionState, list[Told]]:
    """One turn of a session to its end."""
    name = engine.submit(ids, replace(PARAMS, max_tokens=num, **params), start=start)
    outputs = drain(engine)
    [state] = [out.state for out in outputs if out.state is not None]
    return state, told(outputs, name)


def rivals_by_definition(grid: Grid, ids: Sequence[int], indices: Sequence[int]) -> list[Any]:
    """The likeliest followers of the ids at these indices: each context read anew, from nothing."""
    engine = exact_engine()
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=3, ignore_eos=True)
    names = [engine.submit(ids[grid.start(i) : i + 1], params) for i in indices]
    outputs = drain(engine)
    return [told(outputs, name)[0][1].top for name in names]
