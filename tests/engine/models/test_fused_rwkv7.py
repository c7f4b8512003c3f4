"""The fused blocks of RWKV-7 against the ops that `model.py` calls one by one: equal bits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cottention.engine.models.checkpoint import load_model
from cottention.engine.models.recurrence import Recurrence
from cottention.engine.models.registry import read_config
from cottention.engine.models.rwkv7.config import RWKV7Config
from cottention.engine.models.rwkv7.model import RWKV7ForCausalLM
from cottention.engine.ops import Segments

NUM_SLOTS = 6
BATCHES = {
    "one token": ([3], [1]),
    "decode with padding": ([5, -1, 0, 2], [1, 1, 1, 1]),
    "prompts, tokens and padding": ([2, 4, -1, 0], [37, 1, 3, 6]),
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(golden: Path, request: pytest.FixtureRequest) -> RWKV7ForCausalLM:
    config = read_config(golden / "rwkv7")
    assert isinstance(config, RWKV7Config)
    made = load_model(golden / "rwkv7", config, getattr(torch, request.param))
    assert isinstance(made, RWKV7ForCausalLM)
    return made.serve("cpu")


def pool(model: RWKV7ForCausalLM) -> dict[str, Tensor]:
    """Rows in use, with a spare layer's stride between slots as in a pool."""
    generator = torch.Generator().manual_seed(0)
    shapes = model.config.state_spec().shapes
    return {
        name: torch.randn(NUM_SLOTS, *shape, generator=generator) / 3
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("name", BATCHES)
def test_all_blocks_in_one_call_have_the_bits_of_the_ops(
    model: RWKV7ForCausalLM, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots, lengths = BATCHES[name]
    segments = Segments.of(slots, lengths, NUM_SLOTS, "cpu")
    ids = torch.arange(sum(lengths)) * 7 % model.config.vocab_size
    fused, apart = pool(model), pool(model)
    with torch.inference_mode():
        got = model.hidden(ids, ids, Recurrence(fused, segments))
        assert model.fused is not None
        monkeypatch.setattr(model, "fused", None)
        expected = model.hidden(ids, ids, Recurrence(apart, segments))
    owner = torch.tensor(slots).repeat_interleave(torch.tensor(lengths))
    assert torch.equal(got[owner >= 0], expected[owner >= 0])
    for tensor, row in apart.items():
        assert torch.equal(fused[tensor], row), tensor


def test_a_model_in_float16_runs_the_ops_one_by_one(golden: Path) -> None:
    """Its weights are not packed."""
    config = read_config(golden / "rwkv7")
    made = load_model(golden / "rwkv7", config, torch.float16)
    assert isinstance(made, RWKV7ForCausalLM)
    assert made.serve("cpu").fused is None


def test_weights_and_rows_that_do_not_fit_are_refused(model: RWKV7ForCausalLM) -> None:
    assert model.fused is not None
    rows, width = pool(model), model.config.hidden_size
    before = {name: row.clone() for name, row in rows.items()}
    segments = Segments.of([0], [1], NUM_SLOTS, "cpu")
    for x, name, row, message in (
        (torch.zeros(1, width + 8), "state", rows["state"], r"x.size\(1\)"),
        (torch.zeros(1, width), "att_shift", rows["att_shift"][:, :1], r"att_shift.size\(1\)"),
        (torch.zeros(1, width), "ffn_shift", rows["ffn_shift"].double(), "ffn_shift has the wrong"),
        (torch.zeros(1, width), "state", rows["state"][:, :1], "weights has"),
        (torch.zeros(1, width), "state", rows["state"][:0], "out of range|size"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model.fused(x, Recurrence(rows | {name: row}, segments))
    assert all(torch.equal(rows[name], row) for name, row in before.items())
