"""A family with a tensor of its own beside the recurrence: nothing else needs to know of it.

Its state has `shift` [L, C], the last token's row, as families with token shift will have. What
names only `state` and `denominator` would lose it: in a copy, a snapshot, a fingerprint or a sum.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from cottention.engine.errors import (
    ConfigurationError,
    ModelFolderError,
    SnapshotError,
    SnapshotMismatchError,
)
from cottention.engine.models import registry
from cottention.engine.models.config import ModelConfig, size
from cottention.engine.models.family import ModelFamily, ModelImplementation
from cottention.engine.models.recurrence import Recurrence
from cottention.engine.models.registry import read_config
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.sessions.fingerprint import Fingerprint
from cottention.engine.sessions.memory_usage import SessionBytes
from cottention.engine.sessions.snapshot import SnapshotCodec
from cottention.engine.state.context_window import context_schedules
from cottention.engine.state.pool import StatePool
from cottention.engine.state.session_state import SessionState
from cottention.engine.state.spec import StateSpec, StateTensor, recurrence_tensors
from tests.engine.making import attention_folder, small_tokenizer

DEPTH, WIDTH, WINDOW = 2, 8, 16


@dataclass(frozen=True, slots=True)
class CounterConfig(ModelConfig):
    """Says the next id after each id; its state is allocated and never read."""

    model_type: ClassVar[str] = "counter"
    arithmetic_fields: ClassVar[tuple[str, ...]] = ("vocab_size", "width")

    width: int

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str) -> Self:
        return cls(size(raw, "vocab_size", where), size(raw, "width", where))

    @property
    def trained_length(self) -> int:
        return WINDOW

    def state_tensors(self) -> tuple[StateTensor, ...]:
        recurrence = recurrence_tensors(
            layers=DEPTH, heads=1, value_width=self.width, key_width=self.width
        )
        return (*recurrence, StateTensor("shift", (DEPTH, self.width)))

    def description(self) -> dict[str, str]:
        return {"shape": "made up"}


class Counter(nn.Module):
    """One table: the row of an id is the logits of its successor."""

    def __init__(self, config: CounterConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)


class ServedCounter:
    def __init__(self, model: Counter, device: str) -> None:
        self._table = model.table.weight.to(device)

    def hidden(self, ids: Tensor, _positions: Tensor, recurrence: Recurrence) -> Tensor:
        assert set(recurrence.tensors) == {"state", "shift"}
        return self._table[ids]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.float()


COUNTER = ModelFamily(
    config=CounterConfig,
    context_policy="exact",
    implementation=lambda: ModelImplementation(
        build=Counter,
        weight_dtype=lambda _, dtype: dtype,
        weights_hint=lambda names, _: f". There are {len(list(names))}",
        serve=ServedCounter,
    ),
)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(registry.FAMILIES, "counter", COUNTER)
    return


@pytest.fixture
def counter_folder(tmp_path: Path) -> Path:
    num_ids = small_tokenizer().num_ids
    raw = {"model_type": "counter", "vocab_size": num_ids, "width": WIDTH}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (attention_folder("cottention") / name).is_file():
            shutil.copy(attention_folder("cottention") / name, tmp_path)
    successors = torch.eye(num_ids).roll(1, dims=1)
    save_file({"table.weight": successors.contiguous()}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def spec(counter_folder: Path) -> StateSpec:
    return read_config(counter_folder).state_spec()


def numbered(spec: StateSpec, first: int) -> tuple[Tensor, ...]:
    """One state's tensors, each filled with a number of its own."""
    shapes = spec.shapes.values()
    return tuple(torch.full(shape, float(first + i)) for i, shape in enumerate(shapes))


def equal(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def test_it_is_served_by_an_engine_that_does_not_know_it(counter_folder: Path) -> None:
    engine = Engine(counter_folder, EngineConfig(max_slots=2))
    params = SamplingParams(max_tokens=4, temperature=0.0)
    [completion] = engine.generate([[5]], params)
    assert list(completion.token_ids) == [6, 7, 8, 9]
    assert engine.policies.default == "exact", "the family's own"
    assert engine.spec.itemised_bytes()["spare"] == 0
    renewing = Engine(counter_folder, EngineConfig(max_slots=2, context_policy="renew"))
    assert renewing.spec.itemised_bytes()["spare"] == engine.spec.bytes_per_row


def test_a_row_of_the_pool_moves_as_a_whole(spec: StateSpec) -> None:
    pool = StatePool(replace(spec, has_spare=True), 2, "cpu")
    assert {name: tensor.shape for name, tensor in pool.tensors.items()} == {
        "state": (4, DEPTH, 1, WIDTH, WIDTH),
        "shift": (4, DEPTH, WIDTH),
    }
    assert pool.nbytes == 2 * pool.spec.bytes_per_slot
    values = numbered(spec, 3)
    pool.write(1, values)
    pool.copy(1, [0, 3])
    assert all(equal(pool.read(row), values) for row in (0, 1, 3))
    pool.clear(1)
    assert not any(tensor.any() for tensor in pool.read(1))
    assert equal(pool.read(0), values)


def codec(spec: StateSpec, layout: str = "layout") -> SnapshotCodec:
    prints = Fingerprint("w", "t", "c", layout)
    return SnapshotCodec(prints, spec, 100, context_schedules(WINDOW), WINDOW)


def test_a_snapshot_has_it_by_name(spec: StateSpec) -> None:
    state = SessionState(numbered(spec, 1), 2, (7,), (5, 6, 7), {5: 1, 6: 1, 7: 1})
    raw = codec(spec).encode(state)
    assert b'"row.state"' in raw
    assert b'"row.shift"' in raw
    assert equal(codec(spec).decode(raw).rows, state.rows)
    assert codec(spec).encode(codec(spec).decode(raw)) == raw
    with pytest.raises(SnapshotError):  # the layouts' texts differ, unless they lie
        codec(StateSpec(spec.tensors[:1])).decode(raw)
    with pytest.raises(SnapshotMismatchError, match="layout"):
        codec(spec, "another").decode(raw)


def test_a_fingerprint_has_its_name_shape_and_dtype(counter_folder: Path, spec: StateSpec) -> None:
    made = Fingerprint.of(counter_folder, [], spec, "bfloat16")
    assert made.layout == "state=2x1x8x8:float32 shift=2x8:float32 weights=bfloat16"
    assert made.config.startswith("model_type=counter vocab_size=")


def test_capacity_itemises_it(spec: StateSpec) -> None:
    cost = SessionBytes.of(
        spec, num_ids=10, window=WINDOW, max_checkpoints=0, max_event_log_bytes=0
    )
    state, shift = 4 * DEPTH * WIDTH * WIDTH, 4 * DEPTH * WIDTH
    assert list(cost.items)[:4] == ["state", "denominator", "shift", "spare"]
    assert [cost.items[name] for name in ("state", "denominator", "shift")] == [state, 0, shift]
    assert cost.places["resident"] == cost.items["turn_copy"] == state + shift


def test_its_weights_are_checked_and_its_hint_is_given(counter_folder: Path) -> None:
    save_file({"other.weight": torch.zeros(1)}, counter_folder / "model.safetensors")
    with pytest.raises(ModelFolderError, match=r"missing: table\.weight; .*\. There are 1"):
        Engine(counter_folder, EngineConfig(max_slots=1))


def test_it_refuses_to_embed(counter_folder: Path) -> None:
    """It has no `last_hidden`; without the check the first request would end with an error."""
    with pytest.raises(ConfigurationError, match="--embeddings: models of type counter"):
        Engine(counter_folder, EngineConfig(max_slots=1, embeddings=True))
