"""The blocks of RWKV-7 and Mamba-2 in one call, against the ops that they consist of: same bits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cottention.engine.models.checkpoint import load_model
from cottention.engine.models.recurrence import Recurrence
from cottention.engine.models.recurrent_model import RecurrentModel
from cottention.engine.models.registry import family_of, read_config
from cottention.engine.ops import Segments

NUM_SLOTS = 6
CASES = ["rwkv7", "mamba2", "mamba2-groups"]
BATCHES = {
    "one token": ([3], [1]),
    "decode with padding": ([5, -1, 0, 2], [1, 1, 1, 1]),
    "prompts, tokens and padding": ([2, 4, -1, 0], [37, 1, 3, 6]),
}
Served = RecurrentModel[None]


def served(folder: Path, dtype: torch.dtype) -> Served:
    config = read_config(folder)
    implementation = family_of(config).implementation()
    model = implementation.serve(load_model(folder, config, dtype), "cpu")
    assert isinstance(model, RecurrentModel)
    return model


@pytest.fixture(scope="module", params=CASES)
def folder(golden: Path, request: pytest.FixtureRequest) -> Path:
    return golden / str(request.param)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["single", "bfloat16"])
def model(folder: Path, request: pytest.FixtureRequest) -> Served:
    return served(folder, request.param)


def pool(folder: Path) -> dict[str, Tensor]:
    """Rows in use, by name."""
    generator = torch.Generator().manual_seed(0)
    shapes = read_config(folder).state_spec().shapes
    return {n: torch.randn(NUM_SLOTS, *s, generator=generator) / 3 for n, s in shapes.items()}


@pytest.mark.parametrize("name", BATCHES)
def test_all_blocks_in_one_call_have_the_bits_of_the_ops(
    folder: Path, model: Served, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots, lengths = BATCHES[name]
    segments = Segments.of(slots, lengths, NUM_SLOTS, "cpu")
    ids = torch.arange(sum(lengths)) * 7 % read_config(folder).vocab_size
    fused, apart = pool(folder), pool(folder)
    assert model.fused is not None
    with torch.inference_mode():
        got = model.hidden(ids, ids, Recurrence(fused, segments))
        monkeypatch.setattr(model, "fused", None)
        expected = model.hidden(ids, ids, Recurrence(apart, segments))
    is_real = torch.tensor(slots).repeat_interleave(torch.tensor(lengths)) >= 0
    assert torch.equal(got[is_real], expected[is_real])
    for tensor, rows in apart.items():
        assert torch.equal(fused[tensor], rows), tensor


def test_weights_in_float16_are_not_packed(folder: Path) -> None:
    """Such a model runs the ops one by one."""
    assert served(folder, torch.float16).fused is None


def test_rows_that_do_not_fit_are_refused(folder: Path, model: Served) -> None:
    assert model.fused is not None
    rows, width = pool(folder), read_config(folder).hidden_size  # type: ignore[attr-defined]
    before = {name: row.clone() for name, row in rows.items()}
    segments = Segments.of([0], [1], NUM_SLOTS, "cpu")
    tails = [name for name in rows if name != "state"]
    wrong = [
        ("state", rows["state"][:, :1], "weights has"),
        ("state", rows["state"].double(), "state has the wrong dtype"),
        ("state", rows["state"][:0], "out of range|size"),
        *((name, rows[name][:, :1], rf"{name}.size\(1\)") for name in tails),
        *((name, rows[name].double(), f"{name} has the wrong dtype") for name in tails),
        *((name, rows[name][..., 1:], rf"{name}.size") for name in tails),
    ]
    for name, row, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            model.fused(torch.zeros(1, width), Recurrence(rows | {name: row}, segments))
    with pytest.raises(RuntimeError, match=r"size\(1\)|size\(0\)"):
        model.fused(torch.zeros(1, width + 8), Recurrence(rows, segments))
    assert all(torch.equal(rows[name], row) for name, row in before.items())
