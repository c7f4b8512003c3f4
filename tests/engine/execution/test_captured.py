"""Sampling in captured decode, with a capture that captures nothing: which graphs sample what.

That engines give the same ids with graphs and without: test_cuda_graphs.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cottention.engine.execution.cuda_graphs import CapturedDecode, Row
from cottention.engine.sampling.sampler import Sampler, SamplingInput
from cottention.engine.sampling.token_history import TokenCounts
from cottention.engine.sampling_params import SamplingParams

VOCABULARY = 40
GREEDY = {"temperature": 0}
FILTERED = {"top_p": 0.7, "top_k": 8}
PENALTY = {"repetition_penalty": 2.0}


class Captures:
    """Notes the ways in which captured functions are called again."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []

    def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
        def replay() -> Any:
            self.outputs.append(function())
            return self.outputs[-1]

        return replay


def decode(ids: Tensor, positions: Tensor, _slots: Tensor) -> Tensor:
    """Logits that are a function of the row."""
    waves = torch.arange(VOCABULARY) * (1.0 + ids.unsqueeze(-1)) + positions.unsqueeze(-1)
    return 3 * torch.sin(waves)


def captured() -> tuple[CapturedDecode, Captures, Sampler]:
    captures, sampler = Captures(), Sampler(range(1, VOCABULARY), VOCABULARY, "cpu")
    return CapturedDecode(decode, sampler, 16, "cpu", captures), captures, sampler


def inputs_of(kinds: list[dict[str, Any]]) -> list[SamplingInput]:
    return [
        SamplingInput(
            SamplingParams(**kind),
            (i + 0.5) / len(kinds),
            TokenCounts((), {1 + i: 2} if kind == PENALTY else {}),
        )
        for i, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize(
    "kinds",
    [
        [GREEDY] * 3,
        [{}],
        [{}, GREEDY, {"min_p": 0.1}],
        [FILTERED, {}, GREEDY, FILTERED, {"top_k": 3}],
        [PENALTY, FILTERED, {}, GREEDY],
        [{"logprobs": 2}, GREEDY],
    ],
)
def test_ids_are_the_samplers(kinds: list[dict[str, Any]]) -> None:
    """Rows behind those that draw are spares, and get nothing."""
    decoding, _, sampler = captured()
    inputs = inputs_of(kinds)
    rows = [Row(3 + i, 10 * i, i) for i in range(len(inputs) + 2)]
    ids, positions = (torch.tensor([row[i] for row in rows[: len(inputs)]]) for i in (0, 1))
    expected = sampler.sample(decode(ids, positions, ids), inputs)
    for _ in range(2):
        assert decoding.run(rows, inputs) == expected


def test_chance_is_in_the_graph_and_one_tensor_of_ids_comes_out() -> None:
    decoding, captures, _ = captured()
    for kinds in ([{}], [FILTERED, {}], [GREEDY, {}]):
        decoding.run([Row(1, 1, i) for i in range(len(kinds))], inputs_of(kinds))
        assert captures.outputs[-1].dtype == torch.int64


def test_parameters_of_an_earlier_batch_are_forgotten() -> None:
    decoding, _, _ = captured()
    rows = [Row(1, 1, i) for i in range(4)]
    alone = decoding.run(rows[:1], inputs_of([{}]))
    decoding.run(rows, inputs_of([FILTERED] * 4))
    assert decoding.run(rows[:1], inputs_of([{}])) == alone


def test_spares_alone_draw_nothing() -> None:
    assert captured()[0].run([Row(1, 1, 0)], []) == []
