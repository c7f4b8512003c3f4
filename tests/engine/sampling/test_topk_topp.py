"""Drawing ids: that ways agree, and that nothing waits for a device. The rest: test_sampler.py."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cottention.engine.sampling.topk_topp import (
    GREEDY_ROW,
    SamplingMode,
    SamplingRow,
    as_tensor,
    draw_ids,
)

VOCABULARY = 50
WISHES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 3.0, "min_p": 0.2},
    {"top_k": 5},
    {"top_p": 0.5},
    {"top_p": 0.8, "top_k": 9, "min_p": 0.05, "temperature": 1.3},
]


def some(rows: int, seed: int) -> tuple[Tensor, list[SamplingRow]]:
    """Logits with many ties and impossible ids, and a mix of wishes."""
    rng = random.Random(seed)
    logits = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    logits = (logits * 4).round() / 2
    logits[:, ::7] = -torch.inf
    wishes = [
        GREEDY_ROW._replace(temperature=1.0, uniform=rng.random())._replace(**rng.choice(WISHES))
        for _ in range(rows)
    ]
    return logits, wishes


def drawn(logits: Tensor, wishes: list[SamplingRow], way: SamplingMode) -> list[int]:
    return draw_ids(logits, logits.argmax(-1), as_tensor(wishes), way).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_a_dearer_way_gives_a_row_the_id_of_its_own(seed: int) -> None:
    """Also across the tiles in which rows are sorted: 200 rows together are as each alone."""
    logits, wishes = some(200, seed)
    own = [drawn(logits[i : i + 1], [wish], wish.way)[0] for i, wish in enumerate(wishes)]
    assert drawn(logits, wishes, SamplingMode.FROM_FIRST) == own
    cheap = [i for i, wish in enumerate(wishes) if wish.way <= SamplingMode.FROM_ALL]
    together = drawn(logits[cheap], [wishes[i] for i in cheap], SamplingMode.FROM_ALL)
    assert together == [own[i] for i in cheap]


@pytest.mark.parametrize("way", SamplingMode)
def test_a_row_without_a_likeliest_id_gets_none(way: SamplingMode) -> None:
    logits, wishes = some(6, seed=1)
    logits[2] = torch.nan
    logits[4] = -torch.inf
    likeliest = logits.argmax(-1)
    likeliest[[2, 4]] = -1
    ids = draw_ids(logits, likeliest, as_tensor(wishes), way).tolist()
    assert [i for i, token_id in enumerate(ids) if token_id < 0] == [2, 4]
    assert max(ids) < VOCABULARY


@pytest.mark.parametrize("way", SamplingMode)
def test_nothing_waits_for_a_device(way: SamplingMode) -> None:
    """Tensors without values would raise where Python asks for one, as it must not in a graph."""
    with FakeTensorMode():
        logits, likeliest = torch.empty(130, VOCABULARY), torch.empty(130, dtype=torch.int64)
        ids = draw_ids(logits, likeliest, torch.empty(130, 5, dtype=torch.float64), way)
    assert (ids.shape, ids.dtype) == ((130,), torch.int64)


def test_a_wish_is_exact_as_a_tensor() -> None:
    wish = SamplingRow(0.1 + 2**-53, 5e-324, 1e-300, 2**31 - 1, 1 - 2**-53)
    assert as_tensor([wish]).tolist() == [list(map(float, wish))]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("way", [SamplingMode.FROM_ALL, SamplingMode.FROM_FIRST])
@pytest.mark.parametrize("rows", [1, 64, 65, 512])
def test_a_gpu_draws_what_the_cpu_draws_but_at_the_edges(rows: int, way: SamplingMode) -> None:
    """Likelihoods differ in their last bits, and so do ids whose number falls between two."""
    generator = torch.Generator().manual_seed(rows)
    logits = 3 * torch.randn(rows, 50_257, generator=generator)
    logits[:, ::7] = -torch.inf
    wish = SamplingRow(
        0.0,
        1.1,
        0.01,
        200 * (way is SamplingMode.FROM_FIRST),
        0.95 if way is SamplingMode.FROM_FIRST else 1,
    )
    wishes = as_tensor([wish._replace(uniform=(i + 0.5) / rows) for i in range(rows)])
    given = logits.cuda(), logits.argmax(-1).cuda(), wishes.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids = draw_ids(*given, way)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = draw_ids(logits, logits.argmax(-1), wishes, way)
    assert (ids.cpu() == expected).float().mean() > 0.95
    assert logits.gather(-1, ids.cpu().unsqueeze(-1)).isfinite().all()
