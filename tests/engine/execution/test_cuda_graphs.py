"""Captured decode: with a capture that captures nothing on the CPU, with CUDA graphs on a GPU.

The buffers, the padding and the choice of a graph are the same in both.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.execution.cuda_graphs import (
    MAX_ROWS,
    CapturedDecode,
    DecodeGraphs,
    DecodeRows,
)
from cottention.engine.execution.model_runner import ModelRunner

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11], [12]]


def run_again(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Captures nothing: what a graph would replay is called."""
    return function


def captured_on_cpu(runner: ModelRunner, num_rows: int) -> CapturedDecode:
    return CapturedDecode(runner._decode, runner._sampler, num_rows, "cpu", run_again)


def generated(engine: Engine, params: SamplingParams) -> list[tuple[int, ...]]:
    return [done.token_ids for done in engine.generate(PROMPTS, params)]


@pytest.mark.every_attention
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=9, temperature=0, ignore_eos=True),
        SamplingParams(max_tokens=9, temperature=1.5, seed=3, ignore_eos=True),
        SamplingParams(max_tokens=9, top_k=20, top_p=0.9, seed=3, ignore_eos=True),
        SamplingParams(max_tokens=9, temperature=0, repetition_penalty=3.0, ignore_eos=True),
    ],
    ids=["greedy", "chance", "filtered", "penalty"],
)
def test_an_engine_with_graphs_gives_the_same_ids(
    gptj_folder: Path, params: SamplingParams
) -> None:
    """On the CPU rows do not know each other, so that padding changes no bit."""
    config = EngineConfig(max_slots=5, max_batch_tokens=8, device="cpu")
    expected = generated(Engine(gptj_folder, config), params)
    engine = Engine(gptj_folder, config)
    engine._runner._captured = captured_on_cpu(engine._runner, engine.pool.num_rows)
    engine.warm_up()
    assert not engine.pool.tensors["state"].any()
    assert generated(engine, params) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "kind",
    [{"temperature": 0}, {"seed": 3}, {"seed": 3, "temperature": 0.8, "top_p": 0.9, "top_k": 20}],
    ids=["greedy", "chance", "filtered"],
)
def test_captured_and_plain_steps_agree_on_a_gpu(gptj_folder: Path, kind: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=9, ignore_eos=True, **kind)
    config = EngineConfig(max_slots=5, device="cuda", dtype="float32")
    captured, plain = Engine(gptj_folder, config), Engine(gptj_folder, config)
    plain._runner._captured = None
    expected = generated(Engine(gptj_folder, EngineConfig(max_slots=5, device="cpu")), params)
    assert generated(captured, params) == generated(plain, params) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_steps_ahead_give_the_same_ids_on_a_gpu(
    gptj_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids are taken from the device before the host has them; streams end at different steps."""
    config = EngineConfig(max_slots=5, device="cuda", dtype="float32")
    params = SamplingParams(max_tokens=40, seed=3, temperature=1.3, top_p=0.95)
    ahead = generated(Engine(gptj_folder, config), params)
    monkeypatch.setattr(ModelRunner, "max_rows_ahead", 0)
    assert generated(Engine(gptj_folder, config), params) == ahead


def doubled(ids: Tensor, positions: Tensor, slots: Tensor, _sampling_rows: Tensor) -> Tensor:
    return torch.stack([ids * 2, positions, slots.long()])


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_takes_the_smallest_graph_that_holds_it(device: str) -> None:
    capture = run_again if device == "cpu" else None
    graphs = DecodeGraphs(doubled, 11, device, capture)
    assert graphs.sizes() == [1, 2, 4, 8, 11]
    graphs.warm_up()
    for num_rows, size in [(1, 1), (3, 4), (8, 8), (9, 11), (2, 2), (11, 11)]:
        slots = range(num_rows)
        rows = DecodeRows([10 + i for i in slots], [100 + i for i in slots], slots)
        out = graphs.run(rows).cpu()
        assert out.shape == (3, size)
        assert out[:, :num_rows].T.tolist() == [[20 + 2 * i, 100 + i, i] for i in slots]
        assert (out[2, num_rows:] == -1).all()


def test_sizes_end_where_graphs_stop_paying() -> None:
    assert DecodeGraphs(doubled, 10_000, "cpu", run_again).sizes()[-1] == MAX_ROWS
    assert DecodeGraphs(doubled, 1, "cpu", run_again).sizes() == [1]
    assert DecodeGraphs(doubled, 8, "cpu", run_again).sizes() == [1, 2, 4, 8]
    large = DecodeGraphs(doubled, 300, "cpu", run_again).sizes()
    assert large == [1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 300]


def test_a_slot_named_twice_is_refused_before_anything_runs() -> None:
    graphs = DecodeGraphs(doubled, 4, "cpu", run_again)
    with pytest.raises(ValueError, match="named twice"):
        graphs.run(DecodeRows([1, 1], [1, 1], [2, 2]))
    with pytest.raises(ValueError, match="out of range"):
        graphs.run(DecodeRows([1], [1], [4]))
