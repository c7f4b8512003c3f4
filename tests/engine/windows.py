"""Small models whose window is a few tokens, and what they should say by the plain definition."""

import functools
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cottention.engine import Engine, EngineConfig, Output, SamplingParams
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.outputs import TokenLogprob
from cottention.engine.state.context_window import ContextSchedule
from cottention.engine.state.session_state import SessionState
from tests.engine.making import FAMILIES, family_folder, weights_of_kind

_MODEL = Path(__file__).parents[1] / "data" / "golden" / "cottention-gptj"
_HOLD = tempfile.TemporaryDirectory(prefix="cottention-windows-")
PARAMS = SamplingParams(ignore_eos=True, seed=7, logprobs=3)
Told = tuple[int, TokenLogprob]


@functools.cache
def folder_of(window: int, attention: str = "cottention") -> Path:
    """The small model, as if it had been trained on `window` tokens, with any attention.

    That of a recurrent family is as it is: its sessions are not renewed.
    """
    if attention in FAMILIES:
        return family_folder(attention)
    target = Path(_HOLD.name) / f"{attention}-{window}"
    shutil.copytree(_MODEL, target, ignore=shutil.ignore_patterns("expected.*"), dirs_exist_ok=True)
    changes = {"n_positions": window, "attention_type": attention}
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    if attention != "cottention":
        weights = weights_of_kind(GPTJConfig.from_dict(config, attention))
        torch.save(weights, target / "pytorch_model.bin")
    return target


def engine_of(window: int, attention: str = "cottention", **settings: Any) -> Engine:
    folder = folder_of(window, attention)
    return Engine(folder, EngineConfig(**{"max_slots": 4, **settings}))


@functools.cache
def exact_engine(window: int, attention: str) -> Engine:
    """For contexts that are read anew: up to a window, where nothing is ever forgotten.

    cosFormer's M has no room for an answer after a whole window, unless it would be renewed.
    """
    policy = "renew" if attention == "cosformer" else "exact"
    return engine_of(window, attention, context_policy=policy, prefix_cache_bytes=0, max_slots=64)


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


def rivals_by_definition(
    grid: ContextSchedule,
    ids: Sequence[int],
    indices: Sequence[int],
    window: int = 64,
    attention: str = "cottention",
) -> list[Any]:
    """The likeliest followers of the ids at these indices: each context read anew, from nothing.

    window: of the model. It is cosFormer's M, too.
    """
    engine = exact_engine(window, attention)
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=3, ignore_eos=True)
    names = [engine.submit(ids[grid.start(i) : i + 1], params) for i in indices]
    outputs = drain(engine)
    return [told(outputs, name)[0][1].top for name in names]
