"""Log-probabilities over HTTP against the model's own, computed in float64 by the parallel form."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from cottention.engine.models.checkpoint import load_model
from cottention.engine.models.gptj.model import CottentionForCausalLM
from cottention.engine.models.recurrence import Features
from cottention.engine.models.registry import read_config
from cottention.engine.ops import reference
from tests.server.live import Live, serving

MAX_BATCH = 64
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def live(gptj_folder: Path) -> Iterator[Live]:
    with serving(Engine(gptj_folder, EngineConfig(max_slots=MAX_BATCH))) as live:
        yield live


@pytest.fixture(scope="module")
def model(gptj_folder: Path) -> CottentionForCausalLM:
    return load_model(gptj_folder, read_config(gptj_folder), torch.float64)


def attend(_: int, features: Features) -> Tensor:
    q, k, v = (x.transpose(-3, -2) for x in features[:3])
    return reference.parallel(q, k, v).transpose(-3, -2)


def own_logprobs(model: CottentionForCausalLM, ids: list[int]) -> Tensor:
    """Float64 [T, N]: row t is of what follows id t."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), torch.arange(len(ids)), attend)
    return torch.log_softmax(logits[0], dim=-1)


def prompts(num: int) -> list[list[int]]:
    draw = random.Random(num)
    return [[draw.randrange(300) for _ in range(draw.randint(2, 40))] for _ in range(num)]


def check(logprobs: Any, ids: list[int], model: CottentionForCausalLM) -> None:
    """All but the first of `ids` are scored, whether given or drawn."""
    own = own_logprobs(model, ids)
    expected = own[:-1].gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).squeeze(-1)
    told = logprobs["token_logprobs"]
    assert told[0] is None
    assert len(told) == len(ids)
    assert (torch.tensor(told[1:], dtype=torch.float64) - expected).abs().max() <= TOLERANCE
    for row, top in zip(own[:-1], logprobs["top_logprobs"][1:], strict=True):
        best = row.topk(3).values
        heard = torch.tensor(sorted(top.values(), reverse=True)[:3], dtype=torch.float64)
        assert (heard - best).abs().max() <= TOLERANCE


@pytest.mark.parametrize("batch", [1, 2, 16, MAX_BATCH])
def test_a_scored_prompt_has_the_model_s_own_logprobs(
    live: Live, model: CottentionForCausalLM, batch: int
) -> None:
    given = prompts(batch)
    body = {"max_tokens": 0, "echo": True, "logprobs": 20, "return_tokens_as_token_ids": True}
    choices = live.complete(prompt=given, **body).json()["choices"]
    for ids, choice in zip(given, choices, strict=True):
        check(choice["logprobs"], ids, model)


def test_sampled_tokens_have_logprobs_whatever_the_parameters(
    live: Live, model: CottentionForCausalLM
) -> None:
    given = prompts(8)
    choices = live.complete(
        prompt=given,
        max_tokens=6,
        echo=True,
        logprobs=5,
        temperature=1.7,
        frequency_penalty=1.5,
        logit_bias={"5": 3},
        ignore_eos=True,
        return_token_ids=True,
        return_tokens_as_token_ids=True,
    ).json()["choices"]
    for ids, choice in zip(given, choices, strict=True):
        assert choice["prompt_token_ids"] == ids
        assert len(choice["token_ids"]) == 6
        check(choice["logprobs"], ids + choice["token_ids"], model)


def test_named_ids_have_the_model_s_own_logprobs(live: Live, model: CottentionForCausalLM) -> None:
    """In place of the most probable, in their order; the token itself is told as well."""
    [given] = prompts(1)
    named = [9, 250, 3]
    body: dict[str, Any] = {"max_tokens": 2, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
    body["logprob_token_ids"] = named
    choice = live.complete(prompt=given, logprobs=2, **body).json()["choices"][0]
    own = own_logprobs(model, given + choice["token_ids"])[len(given) - 1 : -1]
    told = choice["logprobs"]["top_logprobs"]
    for row, drawn, top in zip(own, choice["token_ids"], told, strict=True):
        ids = list(dict.fromkeys([*named, drawn]))
        assert [*top] == [f"token_id:{each}" for each in ids]
        assert [*top.values()] == pytest.approx(row[ids].tolist(), abs=TOLERANCE)


@pytest.mark.parametrize(
    "body",
    [
        {"logprob_token_ids": [1]},
        {"logprob_token_ids": [], "logprobs": 0},
        {"logprob_token_ids": [10**6], "logprobs": 0},
        {"logprob_token_ids": list(range(129)), "logprobs": 0},
    ],
)
def test_named_ids_that_cannot_be_told(live: Live, body: Any) -> None:
    refused = live.complete(prompt="x", **body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "logprob_token_ids"


def test_prompt_logprobs_of_each_choice_are_streamed(live: Live) -> None:
    body = {"prompt": ["def f(x):", "import"], "n": 2, "echo": True, "logprobs": 1, "seed": 3}
    whole = live.complete(max_tokens=4, **body).json()["choices"]
    told: dict[int, list[Any]] = {}
    *chunks, _ = live.events(max_tokens=4, **body)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        told.setdefault(choice["index"], []).extend(choice["logprobs"]["token_logprobs"])
    assert [told[index] for index in range(4)] == [
        choice["logprobs"]["token_logprobs"] for choice in whole
    ]
