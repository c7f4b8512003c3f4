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
    sample_ids,
)

VOCABULARY = 50
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 3.0, "min_p": 0.2},
    {"top_k": 5},
    {"top_p": 0.5},
    {"top_p": 0.8, "top_k": 9, "min_p": 0.05, "temperature": 1.3},
]


def some(rows: int, seed: int) -> tuple[Tensor, list[SamplingRow]]:
    """Logits with many ties and impossible ids, and a mix of parameters."""
    rng = random.Random(seed)
    logits = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    logits = (logits * 4).round() / 2
    logits[:, ::7] = -torch.inf
    sampling_rows = [
        GREEDY_ROW._replace(temperature=1.0, uniform=rng.random())._replace(**rng.choice(KINDS))
        for _ in range(rows)
    ]
    return logits, sampling_rows


def sampled(logits: Tensor, sampling_rows: list[SamplingRow], mode: SamplingMode) -> list[int]:
    return sample_ids(logits, logits.argmax(-1), as_tensor(sampling_rows), mode).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_a_more_expensive_mode_gives_a_row_the_id_of_its_own(seed: int) -> None:
    """Also across the tiles in which rows are sorted: 200 rows together are as each alone."""
    logits, sampling_rows = some(200, seed)
    own = [sampled(logits[i : i + 1], [row], row.mode)[0] for i, row in enumerate(sampling_rows)]
    assert sampled(logits, sampling_rows, SamplingMode.TOP_K_TOP_P) == own
    cheap = [i for i, row in enumerate(sampling_rows) if row.mode <= SamplingMode.RANDOM]
    together = sampled(logits[cheap], [sampling_rows[i] for i in cheap], SamplingMode.RANDOM)
    assert together == [own[i] for i in cheap]


@pytest.mark.parametrize("mode", SamplingMode)
def test_a_row_without_an_argmax_gets_none(mode: SamplingMode) -> None:
    logits, sampling_rows = some(6, seed=1)
    logits[2] = torch.nan
    logits[4] = -torch.inf
    argmax_ids = logits.argmax(-1)
    argmax_ids[[2, 4]] = -1
    ids = sample_ids(logits, argmax_ids, as_tensor(sampling_rows), mode).tolist()
    assert [i for i, token_id in enumerate(ids) if token_id < 0] == [2, 4]
    assert max(ids) < VOCABULARY


@pytest.mark.parametrize("mode", SamplingMode)
def test_nothing_waits_for_a_device(mode: SamplingMode) -> None:
    """Tensors without values would raise where Python asks for one, as it must not in a graph."""
    with FakeTensorMode():
        logits, argmax_ids = torch.empty(130, VOCABULARY), torch.empty(130, dtype=torch.int64)
        ids = sample_ids(logits, argmax_ids, torch.empty(130, 5, dtype=torch.float64), mode)
    assert (ids.shape, ids.dtype) == ((130,), torch.int64)


def test_a_sampling_row_is_exact_as_a_tensor() -> None:
    row = SamplingRow(0.1 + 2**-53, 5e-324, 1e-300, 2**31 - 1, 1 - 2**-53)
    assert as_tensor([row]).tolist() == [list(map(float, row))]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", [SamplingMode.RANDOM, SamplingMode.TOP_K_TOP_P])
@pytest.mark.parametrize("rows", [1, 64, 65, 512])
def test_a_gpu_draws_what_the_cpu_draws_but_at_the_edges(rows: int, mode: SamplingMode) -> None:
    """Likelihoods differ in their last bits, and so do ids whose number falls between two."""
    generator = torch.Generator().manual_seed(rows)
    logits = 3 * torch.randn(rows, 50_257, generator=generator)
    logits[:, ::7] = -torch.inf
    row = SamplingRow(
        0.0,
        1.1,
        0.01,
        200 * (mode is SamplingMode.TOP_K_TOP_P),
        0.95 if mode is SamplingMode.TOP_K_TOP_P else 1,
    )
    sampling_rows = as_tensor([row._replace(uniform=(i + 0.5) / rows) for i in range(rows)])
    given = logits.cuda(), logits.argmax(-1).cuda(), sampling_rows.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids = sample_ids(*given, mode)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = sample_ids(logits, logits.argmax(-1), sampling_rows, mode)
    assert (ids.cpu() == expected).float().mean() > 0.95
    assert logits.gather(-1, ids.cpu().unsqueeze(-1)).isfinite().all()
