"""The golden cases of the recurrent families: definition and served model against the references.

Each family's own libraries made them. A served model has the definition's arithmetic in float32
and the compiled ops; cut after 17 tokens, with its rows moved in between, it has the same bits.
"""

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cottention.engine.models.checkpoint import load_model
from cottention.engine.models.family import ServedModel
from cottention.engine.models.recurrence import Recurrence
from cottention.engine.models.registry import family_of, read_config
from cottention.engine.ops import Segments

CASES = ["mamba2", "mamba2-groups", "mamba", "rwkv7", "rwkv7-pth"]
CASES += ["gla", "retnet", "hgrn2", "delta_net", "gated_deltanet", "gated_deltanet-gva"]
CUT = 17


class Case:
    """A golden folder, read once."""

    def __init__(self, folder: Path) -> None:
        single = folder / "model.pth"
        self.folder = single if single.exists() else folder
        self.config = read_config(self.folder)
        self.expected = load_file(folder / "expected.safetensors")
        self.ids = self.expected["input_ids"]
        self.batch, self.length = self.ids.shape

    def model(self, dtype: torch.dtype) -> ServedModel:
        """The definition."""
        model: ServedModel = load_model(self.folder, self.config, dtype)  # type: ignore[assignment]
        return model.to(dtype) if dtype == torch.float64 else model  # type: ignore[attr-defined]

    @functools.cached_property
    def served(self) -> ServedModel:
        implementation = family_of(self.config).implementation()
        return implementation.serve(load_model(self.folder, self.config, torch.float32), "cpu")

    def rows(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """A pool of empty states, one of each sequence."""
        shapes = self.config.state_spec().shapes
        return {name: torch.zeros(self.batch, *s, dtype=dtype) for name, s in shapes.items()}

    @torch.inference_mode()
    def logits(self, model: ServedModel, rows: dict[str, Tensor], start: int, stop: int) -> Tensor:
        """Of tokens start:stop of every sequence [B, T, vocab_size]; `rows` are moved on."""
        length = stop - start
        segments = Segments.of(range(self.batch), [length] * self.batch, self.batch, "cpu")
        positions = torch.arange(start, stop).repeat(self.batch)
        ids = self.ids[:, start:stop].flatten()
        hidden = model.hidden(ids, positions, Recurrence(rows, segments))
        return model.logits(hidden).unflatten(0, (self.batch, length))

    def state(self, when: str) -> dict[str, Tensor]:
        """The expected rows, as the pool has them."""
        made = {"state": self.expected[f"state_{when}"]}
        if self.config.model_type == "mamba":
            made["state"] = made["state"].unsqueeze(3)  # a channel is a head of one value
        if f"conv_{when}" in self.expected:
            made["conv"] = self.expected[f"conv_{when}"].transpose(-1, -2)
        for name in ("att_shift", "ffn_shift"):
            if f"{name}_{when}" in self.expected:
                made[name] = self.expected[f"{name}_{when}"]
        return made


@pytest.fixture(scope="module", params=CASES)
def case(golden: Path, request: pytest.FixtureRequest) -> Case:
    return Case(golden / request.param)


def check_rows(rows: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert rows.keys() == expected.keys()
    for name, row in rows.items():
        torch.testing.assert_close(row.float(), expected[name], rtol=0, atol=1e-4, msg=name)


def test_golden_definition_in_float64(case: Case) -> None:
    rows = case.rows(torch.float64)
    logits = case.logits(case.model(torch.float64), rows, 0, case.length)
    assert logits.dtype == torch.float64
    assert (logits - case.expected["logits_float64"]).abs().max() <= 1e-9
    check_rows(rows, case.state("final"))


def test_golden_served_in_float32(case: Case) -> None:
    rows = case.rows(torch.float32)
    logits = case.logits(case.served, rows, 0, case.length)
    assert (logits - case.expected["logits"]).abs().max() <= 3e-5
    check_rows(rows, case.state("final"))


def test_golden_cut_and_resumed_has_the_same_bits(case: Case) -> None:
    whole = case.rows(torch.float32)
    logits = case.logits(case.served, whole, 0, case.length)
    rows = case.rows(torch.float32)
    first = case.logits(case.served, rows, 0, CUT)
    check_rows(rows, case.state(str(CUT)))
    moved = {name: row.clone() for name, row in rows.items()}
    rest = [case.logits(case.served, moved, at, at + 1) for at in range(CUT, case.length)]
    assert torch.equal(torch.cat([first, *rest], dim=1), logits)
    assert all(torch.equal(moved[name], row) for name, row in whole.items())


def test_golden_resumed_from_the_reference_s_rows(case: Case) -> None:
    """Losing a tail, or exchanging its ends, would show in the next tokens."""
    rows = {name: row.clone().contiguous() for name, row in case.state(str(CUT)).items()}
    logits = case.logits(case.served, rows, CUT, case.length)
    assert (logits - case.expected["logits"][:, CUT:]).abs().max() <= 3e-5
    check_rows(rows, case.state("final"))
