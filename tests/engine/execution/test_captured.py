"""Sampling in captured decode, with a capture that captures nothing, and steps that run ahead.

That engines give the same ids with graphs and without: test_cuda_graphs.py, test_ahead.py.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cottention.engine.execution.cuda_graphs import CapturedDecode, Decoded, DecodeRows
from cottention.engine.ops import NO_INDEX
from cottention.engine.sampling.sampler import Sampler
from cottention.engine.sampling.topk_topp import SamplingMode, SamplingRow, as_tensor
from cottention.engine.sampling_params import SamplingParams

VOCABULARY = 40
GREEDY = {"temperature": 0}
FILTERED = {"top_p": 0.7, "top_k": 8}
KINDS = [
    [GREEDY] * 3,
    [{}],
    [{}, GREEDY, {"min_p": 0.1}],
    [FILTERED, {}, GREEDY, FILTERED, {"top_k": 3}],
]


def run_again(function: Callable[[], Any]) -> Callable[[], Any]:
    """Captures nothing: what a graph would replay is called."""
    return function


def decode(ids: Tensor, positions: Tensor, _slots: Tensor) -> Tensor:
    """Logits that are a function of the row."""
    waves = torch.arange(VOCABULARY) * (1.0 + ids.unsqueeze(-1)) + positions.unsqueeze(-1)
    return 3 * torch.sin(waves)


SAMPLER = Sampler(range(1, VOCABULARY), VOCABULARY, "cpu")


def captured() -> CapturedDecode:
    return CapturedDecode(decode, SAMPLER, 16, "cpu", run_again)


def sampling_rows(kinds: list[dict[str, Any]]) -> list[SamplingRow]:
    return [
        SamplingRow.of(SamplingParams(**kind), (i + 0.5) / len(kinds))
        for i, kind in enumerate(kinds)
    ]


def decode_rows(num: int, ids: list[int] | None = None) -> DecodeRows:
    return DecodeRows(ids or [3 + i for i in range(num)], [10 * i for i in range(num)], range(num))


def run(decoding: CapturedDecode, rows: DecodeRows, sampled: list[SamplingRow]) -> Decoded:
    mode = max((row.mode for row in sampled), default=SamplingMode.GREEDY)
    return decoding.run(rows, np.array(sampled).reshape(-1, 5), mode)


def expected_ids(rows: DecodeRows, sampled: list[SamplingRow]) -> list[int]:
    ids, positions = (torch.tensor(x)[: len(sampled)] for x in (rows.ids, rows.positions))
    logits = decode(ids, positions, ids)
    chosen: list[int] = SAMPLER.sample(logits, as_tensor(sampled), {}).ids.tolist()
    return chosen


@pytest.mark.parametrize("kinds", KINDS)
def test_ids_are_the_samplers(kinds: list[dict[str, Any]]) -> None:
    """Rows behind those that are sampled are spares, and get nothing."""
    decoding, rows, sampled = captured(), decode_rows(len(kinds) + 2), sampling_rows(kinds)
    for _ in range(3):
        assert run(decoding, rows, sampled).token_ids.tolist() == expected_ids(rows, sampled)


@pytest.mark.parametrize("kinds", KINDS)
def test_every_graph_leaves_the_logits_as_the_model_gave_them(kinds: list[dict[str, Any]]) -> None:
    """Rows that ask for more are sampled from them, and their log-probabilities are the model's."""
    rows = decode_rows(len(kinds))
    logits = run(captured(), rows, sampling_rows(kinds)).logits[: len(kinds)]
    ids, positions = torch.tensor(rows.ids), torch.tensor(rows.positions)
    assert torch.equal(logits, decode(ids, positions, ids))


def test_parameters_of_an_earlier_batch_are_forgotten() -> None:
    decoding, one = captured(), sampling_rows([{}])
    alone = run(decoding, decode_rows(1), one).token_ids.tolist()
    run(decoding, decode_rows(4), sampling_rows([FILTERED] * 4)).token_ids.tolist()
    assert run(decoding, decode_rows(1), one).token_ids.tolist() == alone


def test_spares_alone_are_not_sampled() -> None:
    assert run(captured(), decode_rows(1), []).token_ids.tolist() == []


def test_a_row_that_got_no_id_is_fed_some_id_that_there_is() -> None:
    """It ends when the step is told; until then −1 would be read outside the embeddings."""
    fed: list[list[int]] = []

    def broken(ids: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        fed.append(ids.tolist())
        logits = decode(ids, positions, slots)
        logits[0] = torch.nan
        return logits

    decoding = CapturedDecode(broken, SAMPLER, 16, "cpu", run_again)
    sampled = sampling_rows([{}, {}])
    first = run(decoding, decode_rows(2), sampled).token_ids.tolist()
    assert first[0] == NO_INDEX
    run(decoding, decode_rows(2)._replace(sources=[0, 1]), sampled)
    assert fed[-1] == [0, first[1]]


@pytest.mark.parametrize("kinds", KINDS)
def test_a_step_takes_ids_from_the_one_before_which_nobody_has_read(
    kinds: list[dict[str, Any]],
) -> None:
    """In another order, beside an id that is known, in a graph of another size; ids read late."""
    num = len(kinds)
    decoding, sampled = captured(), sampling_rows(kinds)
    first = run(decoding, decode_rows(num), sampled)
    sources = [-1, *reversed(range(num))]
    unread = decode_rows(num + 1, [7] + [0] * num)._replace(sources=sources)
    more = [*sampled, SamplingRow.of(SamplingParams(), 0.3)]
    second = run(decoding, unread, more)
    ids = first.token_ids.tolist()
    assert ids == expected_ids(decode_rows(num), sampled)
    known = decode_rows(num + 1, [7, *reversed(ids)])
    assert second.token_ids.tolist() == expected_ids(known, more)
