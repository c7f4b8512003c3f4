"""Drawing ids: that ways agree, and that nothing waits for a device. The rest: test_sampler.py."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cottention.engine.sampling import topk_topp
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


def sorted_out(weights: Tensor, logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The definition, for one row [N]: ids in descending order, equal ones by id."""
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    order = order[:top_k] if top_k > 0 else order
    total, so_far = sum(float(weights[i]) for i in order), 0.0
    kept = torch.zeros_like(weights)
    for place, i in enumerate(order):
        if place and top_p < 1 and so_far >= top_p * total:
            break
        kept[i] = weights[i]
        so_far += float(weights[i])
    return kept


@pytest.mark.parametrize("columns", [1, 2, 31, 32, 33, 257, 1000])
@pytest.mark.parametrize("spread", [0.0, 1e-30, 0.5, 8.0, 1e30])
def test_what_top_k_and_top_p_keep_is_what_sorting_would(columns: int, spread: float) -> None:
    """Ties of all sizes, zeros of both signs, masked ids; weights that temperature made equal."""
    rng = random.Random(columns)
    generator = torch.Generator().manual_seed(columns)
    for steps in (1, 3, 50, 10_000):
        logits = spread * (torch.randn(6, columns, generator=generator) * steps).round() / steps
        logits[:, 1::5] = -torch.inf
        logits[:3] = torch.where(torch.rand(columns, generator=generator) < 0.2, -0.0, logits[:3])
        temperature = torch.tensor([[rng.choice([0.3, 1.0, 1e9])] for _ in range(6)])
        weights = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()
        top_k = [rng.choice([0, 1, 2, columns // 2, columns, 10**9]) for _ in range(6)]
        top_p = [rng.choice([1e-300, 0.1, 0.5, 0.9, 0.999, 1.0]) for _ in range(6)]
        keys = topk_topp._keys(logits)
        kept = topk_topp._apply_top_k(weights, keys, torch.tensor(top_k).unsqueeze(-1).double())
        kept = topk_topp._apply_top_p(kept, keys, torch.tensor(top_p).unsqueeze(-1).double())
        for row in range(6):
            expected = sorted_out(weights[row], logits[row], top_k[row], top_p[row])
            assert torch.equal(kept[row], expected), (steps, row, top_k[row], top_p[row])


@pytest.mark.parametrize("seed", range(5))
def test_a_more_expensive_mode_gives_a_row_the_id_of_its_own(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also across tiles, of 64 rows here: 200 rows together are as each alone."""
    monkeypatch.setattr(topk_topp, "_MAX_IDS", dict.fromkeys(SamplingMode, 64 * VOCABULARY))
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
