"""Sampling parameters besides temperature and filters: penalties, bias, words, logprobs."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cottention.engine import Engine, EngineConfig, FinishReason, Output, SamplingParams
from cottention.engine.errors import ParameterError, RequestFailedError
from cottention.engine.models.checkpoint import load_model
from cottention.engine.ops import reference

PROMPT = [5, 17, 120, 17, 9, 33]


@pytest.fixture(scope="module")
def engine(gptj_folder: Path) -> Engine:
    return Engine(gptj_folder, EngineConfig(max_slots=64, max_batch_tokens=16))


def outputs(engine: Engine, prompt: Any = PROMPT, **params: Any) -> list[Output]:
    return list(engine.stream(prompt, SamplingParams(**{"temperature": 0, **params})))


def ids(engine: Engine, prompt: Any = PROMPT, **params: Any) -> list[int]:
    return [i for output in outputs(engine, prompt, **params) for i in output.token_ids]


def text(engine: Engine, **params: Any) -> str:
    return "".join(output.text for output in outputs(engine, **params))


def model_logprobs(engine: Engine, gptj_folder: Path, token_ids: list[int]) -> torch.Tensor:
    """log-softmax [T, N] by the parallel definition in float64."""
    model = load_model(gptj_folder, engine.model_config, torch.float64)
    is_divided = "denominator" in engine.spec.shapes

    def attend(_layer: int, features: Any) -> torch.Tensor:
        q, k, v = (x.transpose(-3, -2) for x in features[:3])
        w = None if features.w is None else features.w.transpose(-2, -1)
        return reference.parallel(q, k, v, w=w, denominator=is_divided).transpose(-3, -2)

    with torch.inference_mode():
        logits = model(torch.tensor(token_ids), torch.arange(len(token_ids)), attend)
    return logits.log_softmax(-1)


def num_above(logprobs: torch.Tensor, bound: torch.Tensor) -> int:
    return int((logprobs > bound).sum())


def greedy_by_definition(
    engine: Engine, gptj_folder: Path, length: int, params: SamplingParams
) -> list[int]:
    """Penalties applied by hand, one token after the other."""
    made: list[int] = []
    for _ in range(length):
        row = model_logprobs(engine, gptj_folder, PROMPT + made)[-1].clone()
        for i in set(PROMPT + made):
            row[i] = (
                row[i] / params.repetition_penalty
                if row[i] > 0
                else (row[i] * params.repetition_penalty)
            )
        for i in set(made):
            row[i] -= params.frequency_penalty * made.count(i) + params.presence_penalty
        made.append(int(row[: engine.tokenizer.num_ids].argmax()))
    return made


@pytest.mark.parametrize(
    "penalty", [{"frequency_penalty": 0.4}, {"presence_penalty": 1.5}, {"presence_penalty": -2.0}]
)
def test_penalties_follow_their_definition(
    engine: Engine, gptj_folder: Path, penalty: dict[str, float]
) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True, **penalty)
    expected = greedy_by_definition(engine, gptj_folder, 20, params)
    assert ids(engine, max_tokens=20, ignore_eos=True, **penalty) == expected
    assert expected != ids(engine, max_tokens=20, ignore_eos=True)


def test_repetition_penalty_counts_the_prompt(engine: Engine) -> None:
    plain = ids(engine, max_tokens=1, ignore_eos=True)[0]
    again = [*PROMPT, plain]
    repeated = ids(engine, again, max_tokens=1, ignore_eos=True, logit_bias={plain: 100})
    assert repeated == [plain]
    punished = ids(
        engine,
        again,
        max_tokens=1,
        ignore_eos=True,
        logit_bias={plain: 100},
        repetition_penalty=1e6,
    )
    assert punished != [plain]


def test_bias_moves_one_id(engine: Engine) -> None:
    assert ids(engine, max_tokens=3, logit_bias={77: 100.0}) == [77, 77, 77]
    first = ids(engine, max_tokens=1)[0]
    assert ids(engine, max_tokens=1, logit_bias={first: -100}) != [first]


def test_only_allowed_ids_come(engine: Engine) -> None:
    got = ids(engine, max_tokens=30, temperature=1.0, seed=1, allowed_token_ids=(4, 9, 12))
    assert set(got) == {4, 9, 12}


def test_bad_words_are_not_completed(engine: Engine) -> None:
    params = {"max_tokens": 60, "temperature": 3.0, "seed": 5, "ignore_eos": True}
    common = max("etaoin", key=text(engine, **params).count)
    assert common in text(engine, **params)
    without = text(engine, bad_words=(common,), **params)
    token = engine.tokenizer.encode(common)
    assert len(token) == 1
    assert token[0] not in ids(engine, bad_words=(common,), **params)
    assert without != text(engine, **params)


def test_a_bad_word_of_several_ids(engine: Engine) -> None:
    """The model wants nothing but z; every third one would complete the word."""
    z, *others = engine.tokenizer.encode("zzz")
    assert others == [z, z]
    got = ids(engine, max_tokens=7, ignore_eos=True, logit_bias={z: 100}, bad_words=("zzz",))
    assert [i == z for i in got] == [True, True, False, True, True, False, True]


def test_a_bad_word_of_spaces_alone(engine: Engine) -> None:
    """Without its spaces nothing is left of it, and nothing has no last id to be barred."""
    [space] = engine.tokenizer.encode(" ")
    params = {"max_tokens": 3, "ignore_eos": True, "logit_bias": {space: 100.0}}
    assert ids(engine, **params) == [space] * 3
    without = ids(engine, bad_words=("  ",), **params)
    assert len(without) == 3
    assert space not in without


def test_no_end_before_min_tokens(engine: Engine) -> None:
    end = engine.model_config.eos_token_ids[0]
    eager = {"max_tokens": 9, "logit_bias": {end: 100.0}}
    assert ids(engine, **eager) == [end]
    got = ids(engine, min_tokens=4, **eager)
    assert got[-1] == end
    assert len(got) == 5


def test_an_end_that_the_model_has_not(gptj_folder: Path, tmp_path: Path) -> None:
    """As where a vocabulary was made smaller and config.json left as it was."""
    folder = shutil.copytree(gptj_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["eos_token_id"] = [-1, config["vocab_size"]]
    (folder / "config.json").write_text(json.dumps(config))
    assert len(ids(Engine(folder, EngineConfig(max_slots=1)), max_tokens=3, min_tokens=3)) == 3


def test_stop_strings_wait_for_min_tokens(engine: Engine) -> None:
    params = {"max_tokens": 40, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    whole = text(engine, **params)
    stop = whole[1]
    assert text(engine, stop=(stop,), **params) == whole[: whole.index(stop)]
    late = text(engine, stop=(stop,), min_tokens=10, **params)
    assert len(ids(engine, stop=(stop,), min_tokens=10, **params)) >= 10
    assert whole.startswith(late)


def test_stop_token_ids(engine: Engine) -> None:
    free = ids(engine, max_tokens=10, ignore_eos=True)
    stop = free[4]
    *_, last = outputs(engine, max_tokens=10, ignore_eos=True, stop_token_ids=(stop,))
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, stop)
    cut = free[: free.index(stop) + 1]
    assert ids(engine, max_tokens=10, ignore_eos=True, stop_token_ids=(stop,)) == cut


def test_what_stopped_may_belong_to_the_text(engine: Engine) -> None:
    params = {"max_tokens": 30, "temperature": 1.0, "seed": 8, "ignore_eos": True}
    whole = text(engine, **params)
    stop = whole[3:5]
    place = whole.index(stop)
    assert text(engine, stop=(stop,), **params) == whole[:place]
    got = outputs(engine, stop=(stop,), include_stop_str_in_output=True, **params)
    assert "".join(output.text for output in got) == whole[: place + len(stop)]
    assert got[-1].stop_reason == stop


def test_special_tokens_may_be_written(engine: Engine) -> None:
    end = engine.model_config.eos_token_ids[0]
    params = {"max_tokens": 2, "logit_bias": {end: 100.0}, "ignore_eos": True}
    assert text(engine, **params) == ""
    assert text(engine, skip_special_tokens=False, **params) == "<|endoftext|>" * 2


@pytest.mark.every_attention
@pytest.mark.parametrize("companions", [0, 7, 63])
def test_logprobs_are_the_models_own(engine: Engine, gptj_folder: Path, companions: int) -> None:
    """Whatever the settings and the company: the log-softmax to 1e-5."""
    for number in range(companions):
        other = SamplingParams(max_tokens=8, seed=number, logprobs=number % 21, ignore_eos=True)
        engine.submit([1 + number], other)
    got = outputs(
        engine,
        max_tokens=6,
        temperature=1.3,
        seed=2,
        logprobs=5,
        ignore_eos=True,
        logit_bias={3: 5.0},
        frequency_penalty=1.0,
    )
    made = [i for output in got for i in output.token_ids]
    expected = model_logprobs(engine, gptj_folder, PROMPT + made)[len(PROMPT) - 1 :]
    for row, output in zip(expected, got, strict=False):
        (one,) = output.logprobs
        assert one.token_id == output.token_ids[0]
        assert math.isclose(one.logprob, row[one.token_id], abs_tol=1e-5)
        best = row.topk(5)
        assert [i for i, _ in one.top] == best.indices.tolist()
        assert torch.allclose(
            torch.tensor([p for _, p in one.top]).double(), best.values, atol=1e-5
        )


@pytest.mark.every_attention
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 50])
def test_a_prompt_is_scored_without_generating(
    engine: Engine, gptj_folder: Path, length: int
) -> None:
    """Chunks of the budget (16) leave no seam; n choices and company change nothing."""
    prompt = [(7 * i) % 300 + 1 for i in range(length)]
    engine.submit([3] * 40, SamplingParams(max_tokens=4))
    (last,) = outputs(engine, prompt, max_tokens=0, prompt_logprobs=2)
    assert (last.text, last.token_ids, last.finish_reason) == ("", (), FinishReason.LENGTH)
    assert last.prompt_logprobs is not None
    first, *others = last.prompt_logprobs
    assert first is None
    expected = model_logprobs(engine, gptj_folder, prompt)
    assert [one.token_id for one in others if one] == prompt[1:]
    for place, one in enumerate(others):
        assert one is not None
        own = expected[place, one.token_id]
        assert math.isclose(one.logprob, own, abs_tol=1e-5)
        assert num_above(expected[place], own + 1e-5) < one.rank
        assert one.rank <= 1 + num_above(expected[place], own - 1e-5)
        assert len(one.top) == 2


def test_prompt_scores_come_once(engine: Engine) -> None:
    got = outputs(engine, max_tokens=3, n=2, prompt_logprobs=0, seed=1, ignore_eos=True)
    with_logprobs = [output for output in got if output.prompt_logprobs is not None]
    assert [(output.choice, len(output.prompt_logprobs or ())) for output in with_logprobs] == [
        (0, len(PROMPT))
    ]


def test_a_request_that_forbids_everything_fails_alone(engine: Engine) -> None:
    """Only where its own ids bring it there: what cannot even begin is refused."""
    z = engine.tokenizer.encode("z")[0]
    engine.submit(PROMPT, SamplingParams(max_tokens=5, ignore_eos=True), request_id="beside")
    with pytest.raises(RequestFailedError, match="all are forbidden"):
        engine.generate(
            [PROMPT], SamplingParams(max_tokens=5, allowed_token_ids=(z,), bad_words=("zzz",))
        )
    beside = []
    while engine.has_work():
        beside += [output for output in engine.step() if output.request_id == "beside"]
    assert beside[-1].finish_reason is FinishReason.LENGTH


def test_lower_priority_numbers_go_first(gptj_folder: Path) -> None:
    engine = Engine(gptj_folder, EngineConfig(max_slots=1))
    one = SamplingParams(max_tokens=1, ignore_eos=True)
    for name, priority in (("c", 5), ("a", -1), ("b", 0), ("d", 5)):
        engine.submit([1], one, request_id=name, priority=priority)
    order = []
    while engine.has_work():
        order += [output.request_id for output in engine.step()]
    assert order == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("param", "params"),
    [
        ("stop_token_ids", {"stop_token_ids": (10**6,)}),
        ("logit_bias", {"logit_bias": {-1: 1.0}}),
        ("logit_bias", {"logit_bias": {1: 101.0}}),
        ("allowed_token_ids", {"allowed_token_ids": ()}),
        ("allowed_token_ids", {"allowed_token_ids": (10**9,)}),
        ("min_tokens", {"min_tokens": 17}),
        ("presence_penalty", {"presence_penalty": 2.1}),
        ("frequency_penalty", {"frequency_penalty": math.nan}),
        ("repetition_penalty", {"repetition_penalty": 0}),
        ("logprobs", {"logprobs": 21}),
        ("prompt_logprobs", {"prompt_logprobs": -1}),
        ("bad_words", {"bad_words": ("",)}),
    ],
)
def test_parameters_that_cannot_be_are_refused_by_name(
    engine: Engine, param: str, params: dict[str, Any]
) -> None:
    with pytest.raises(ParameterError) as refused:
        engine.submit(PROMPT, SamplingParams(**params))
    assert refused.value.param == param


def test_parameters_that_leave_nothing_to_begin_with_are_refused(engine: Engine) -> None:
    (a,), (end, *_) = engine.tokenizer.encode("a"), engine.model_config.eos_token_ids
    everything = tuple(range(engine.tokenizer.num_ids))
    contradictions: list[dict[str, Any]] = [
        {"allowed_token_ids": (a,), "bad_words": ("a",)},
        {"allowed_token_ids": (end,), "min_tokens": 2},
        {"allowed_token_ids": (a, end), "stop_token_ids": (a,), "min_tokens": 1},
        {"stop_token_ids": everything, "min_tokens": 1},
    ]
    for params in contradictions:
        with pytest.raises(ParameterError, match="no token is left to begin with") as refused:
            engine.submit(PROMPT, SamplingParams(**params))
        assert refused.value.param in params
        assert not outputs(engine, **{**params, "max_tokens": 0, "min_tokens": 0})[-1].token_ids
    assert not engine.has_work()
