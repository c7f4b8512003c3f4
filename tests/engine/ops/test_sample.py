"""The compiled op `sample` against sampling in torch: the same ids for all parameters; masks."""

import math
import random

import pytest
import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.sampling.topk_topp import (
    GREEDY_ROW,
    SamplingMode,
    SamplingRow,
    as_tensor,
    sample_each,
    sample_ids,
)

pytestmark = pytest.mark.skipif(ops.backend() != "compiled", reason="no compiled ops")
JUST_BELOW_1 = math.nextafter(1.0, 0.0)
ODD_WIDTHS = [1, 2, 15, 16, 17, 333, 4096, 50_257]


def some(rows: int, columns: int, seed: int) -> Tensor:
    """Logits with ties and impossible ids, rows apart."""
    logits = torch.randn(rows, columns + 3, generator=torch.Generator().manual_seed(seed))
    logits = (logits * 40).round() / 8
    logits[:, 3::7] = -torch.inf
    return logits[:, :columns]


def sampling_rows(rows: int, columns: int, seed: int) -> list[SamplingRow]:
    rng = random.Random(seed)
    return [
        SamplingRow(
            rng.choice([0.0, JUST_BELOW_1, rng.random(), rng.random()]),
            rng.choice([0.0, 1.0, rng.uniform(0.1, 3)]),
            rng.choice([0.0, 0.0, rng.random(), 1.0]),
            rng.choice([-1, 0, 1, rng.randint(1, columns), 2**40]),
            rng.choice([1.0, rng.random(), 1e-300, JUST_BELOW_1]),
        )
        for _ in range(rows)
    ]


def by_torch(logits: Tensor, wanted: list[SamplingRow]) -> list[int]:
    return sample_ids(
        logits, logits.argmax(-1), as_tensor(wanted), SamplingMode.TOP_K_TOP_P
    ).tolist()


def by_op(logits: Tensor, wanted: list[SamplingRow]) -> list[int]:
    return ops.sample(logits, logits.argmax(-1), as_tensor(wanted)).tolist()


@pytest.mark.parametrize("columns", ODD_WIDTHS)
@pytest.mark.parametrize("rows", [1, 3, 65])
def test_ids_are_those_of_torch(rows: int, columns: int) -> None:
    """Weights differ in their last bit; where a number falls between two ids, so may these."""
    logits, wanted = some(rows, columns, seed=rows), sampling_rows(rows, columns, seed=columns)
    ids, expected = by_op(logits, wanted), by_torch(logits, wanted)
    assert sum(a != b for a, b in zip(ids, expected, strict=True)) <= rows // 30
    assert all(logits[row, token_id].isfinite() for row, token_id in enumerate(ids))


def test_a_row_does_not_depend_on_the_others() -> None:
    logits, wanted = some(70, 333, seed=4), sampling_rows(70, 333, seed=4)
    alone = [by_op(logits[i : i + 1], [row])[0] for i, row in enumerate(wanted)]
    assert by_op(logits, wanted) == alone
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert by_op(logits, wanted) == alone
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    """The lowest temperatures give the argmax, the highest a uniform distribution."""
    logits = some(50, 333, seed=2)
    wanted = [GREEDY_ROW._replace(temperature=temperature, uniform=i / 50) for i in range(50)]
    ids = by_op(logits, wanted)
    assert ids == by_torch(logits, wanted)
    if temperature < 1:
        argmax = logits.amax(-1)
        assert all(logits[row, token_id] == argmax[row] for row, token_id in enumerate(ids))
    else:
        assert ids == sorted(ids)
        assert len(set(ids)) == 50


@pytest.mark.parametrize("temperature", [1e6, 1e8, 1e308])
def test_high_temperatures_keep_the_order_of_logits(temperature: float) -> None:
    """All weights are 1 in float32; the three largest logits are still the first three."""
    logits = torch.randn(1, 333, generator=torch.Generator().manual_seed(5))
    three = set(logits.topk(3).indices[0].tolist())
    top_k = [SamplingRow((i + 0.5) / 9, temperature, 0.0, 3, 1.0) for i in range(9)]
    top_p = [row._replace(top_k=0, top_p=3 / 333) for row in top_k]
    for wanted in (top_k, top_p):
        rows = logits.repeat(9, 1)
        assert set(by_op(rows, wanted)) == set(by_torch(rows, wanted)) == three


def test_ties_are_ordered_by_id() -> None:
    logits = torch.zeros(10, 333)
    wanted = [SamplingRow((i + 0.5) / 10, 1.0, 0.0, 10, 1.0) for i in range(10)]
    assert by_op(logits, wanted) == list(range(10))
    halves = [row._replace(top_p=0.5) for row in wanted]
    assert by_op(logits, halves) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_rows_without_an_argmax_keep_it() -> None:
    logits = some(3, 40, seed=1)
    logits[1] = torch.nan
    argmax = torch.tensor([5, -1, 7])
    wanted = as_tensor([GREEDY_ROW, GREEDY_ROW._replace(temperature=1.0), GREEDY_ROW])
    assert ops.sample(logits, argmax, wanted).tolist() == [5, -1, 7]
    assert ops.sample(logits[:0], argmax[:0], wanted[:0]).shape == (0,)


def test_each_row_uses_its_own_mode_without_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, wanted = some(40, 333, seed=3), sampling_rows(40, 333, seed=3)
    expected = sample_each(logits, logits.argmax(-1), as_tensor(wanted)).tolist()
    monkeypatch.setattr(ops, "can_sample", lambda _: False)
    assert sample_each(logits, logits.argmax(-1), as_tensor(wanted)).tolist() == expected


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100, 4096])
def test_masked_ids_are_those_of_the_definition(columns: int) -> None:
    """Words without ids, with all and with some; rows in any order, that share a mask or not."""
    random_bits = torch.Generator().manual_seed(columns)
    bitmask = torch.randint(-(2**31), 2**31, (5, 3), generator=random_bits).int()
    bitmask[0], bitmask[1] = 0, -1
    rows, places = [8, 0, 3, 5, 4, 1], [0, 1, 2, 3, 4, 3]
    logits = some(9, columns, seed=1)
    expected = logits.clone()
    ops.apply_token_bitmask(logits, rows, bitmask, places)
    for row, place in zip(rows, places, strict=True):
        for token_id in range(min(columns, 96)):
            if not int(bitmask[place, token_id // 32]) >> token_id % 32 & 1:
                expected[row, token_id] = -torch.inf
    assert torch.equal(logits, expected)
    as_double = some(9, columns, seed=1).double()
    ops.apply_token_bitmask(as_double, rows, bitmask, places)  # by the reference
    assert torch.equal(as_double.float(), expected)


def test_masks_that_do_not_exist_are_not_read() -> None:
    logits, bitmask = some(2, 40, seed=1), torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="row 2 is out of range"):
        ops.apply_token_bitmask(logits, [2], bitmask, [0])
    with pytest.raises(RuntimeError, match="place -1 is out of range"):
        ops.apply_token_bitmask(logits, [0], bitmask, [-1])
    with pytest.raises(RuntimeError, match="bitmask has the wrong dtype"):
        ops.apply_token_bitmask(logits, [0], bitmask.long(), [0])
    with pytest.raises(RuntimeError, match="places"):
        ops.apply_token_bitmask(logits, [0], bitmask, [0, 0])


@pytest.mark.parametrize("argmax", [0, 3])
@pytest.mark.parametrize(
    "nonsense", [SamplingRow(2.0, 1.0, 2.0, -5, -1.0), SamplingRow(*[math.nan] * 5)]
)
def test_invalid_parameters_stay_in_bounds(nonsense: SamplingRow, argmax: int) -> None:
    """The op does not check its parameters, but must not access memory out of bounds."""
    logits = torch.tensor([[0.0, torch.inf, torch.nan, -torch.inf, 50.0]])
    ids = ops.sample(logits, torch.tensor([argmax]), as_tensor([nonsense])).tolist()
    assert 0 <= ids[0] < 5


def test_arguments_are_checked() -> None:
    logits, wanted = torch.zeros(2, 5), as_tensor([GREEDY_ROW] * 2)
    argmax = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"sampling_rows.size\(0\) must be 2"):
        ops.sample(logits, argmax, wanted[:1])
    with pytest.raises(RuntimeError, match="sampling_rows has the wrong dtype"):
        ops.sample(logits, argmax, wanted.float())
    with pytest.raises(RuntimeError, match="argmax of row 1 is out of range"):
        ops.sample(logits, torch.tensor([0, 5]), wanted)
    with pytest.raises(RuntimeError, match="logits has the wrong dtype"):
        ops.sample(logits.double(), argmax, wanted)


def test_opcheck() -> None:
    arguments = (
        some(3, 40, seed=1),
        torch.tensor([0, 1, 2]),
        as_tensor(sampling_rows(3, 40, seed=1)),
    )
    torch.library.opcheck(torch.ops.cottention.sample.default, arguments)
