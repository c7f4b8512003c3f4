"""The pool: exact bytes, zeroed rows, and memory that is asked for before it is taken."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cottention.engine import ops
from cottention.engine.errors import OutOfMemoryError
from cottention.engine.models.recurrence import Recurrence
from cottention.engine.state import pool as state_module
from cottention.engine.state.pool import StatePool, available_memory
from cottention.engine.state.spec import StateSpec, recurrence_tensors

SPECS = [
    StateSpec(
        recurrence_tensors(
            layers=2, heads=3, value_width=8, key_width=16, has_denominator=denominator
        )
    )
    for denominator in (False, True)
]


@pytest.fixture(params=SPECS, ids=["plain", "with denominator"])
def pool(request: pytest.FixtureRequest) -> StatePool:
    return StatePool(request.param, 5, "cpu")


def fill(pool: StatePool, slot: int, value: float) -> None:
    for tensor in pool.tensors.values():
        tensor[slot] = value


def holds(pool: StatePool, slot: int, value: float) -> bool:
    return all(bool((tensor[slot] == value).all()) for tensor in pool.tensors.values())


def test_bytes_are_exactly_those_of_the_spec(pool: StatePool) -> None:
    assert pool.nbytes == pool.spec.bytes_per_slot * 5
    tensors = pool.tensors.values()
    assert sum(t.untyped_storage().nbytes() for t in tensors) == pool.nbytes
    assert all(t.dtype == torch.float32 for t in tensors)
    assert {name: t.shape[1:] for name, t in pool.tensors.items()} == pool.spec.shapes


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc/self/smaps")
@pytest.mark.skipif(ops.backend() == "reference", reason="needs the compiled ops")
def test_a_large_pool_asks_for_large_pages() -> None:
    """Whether it gets them is for the system to say; without, steps look up each small page."""
    spec = StateSpec(recurrence_tensors(layers=8, heads=8, value_width=64, key_width=64))
    pool = StatePool(spec, 8, "cpu")  # 8 MiB
    state = pool.tensors["state"]
    middle = state.data_ptr() + state.nbytes // 2
    assert "hg" in flags_of_memory(middle)
    assert not state.any()


def flags_of_memory(address: int) -> list[str]:
    """The kernel's flags of this process's mapping that holds an address."""
    is_in = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *words = line.split()
        if not name.endswith(":"):
            first, last = (int(end, 16) for end in name.split("-"))
            is_in = first <= address < last
        elif is_in and name == "VmFlags:":
            return words
    raise AssertionError(f"no mapping has {address:x}")


@pytest.mark.parametrize("has_spare", [False, True])
def test_delayed_updates_count_in_a_slot(monkeypatch: pytest.MonkeyPatch, has_spare: bool) -> None:
    """In what a pool takes, in what it is refused for, and in the slots that are said to fit."""
    plain = replace(SPECS[0], has_spare=has_spare)
    spec = replace(plain, delayed_updates=8)
    rows = 1 + has_spare
    assert spec.itemised_bytes()["delayed"] == rows * (8 * 2 * 3 * (8 + 16) * 4 + 4)
    assert spec.bytes_per_slot == plain.bytes_per_slot + spec.itemised_bytes()["delayed"]
    assert spec.bytes_per_row == plain.bytes_per_row  # what a snapshot has
    pool = StatePool(spec, 5, "cpu")
    assert pool.delayed is not None
    assert pool.nbytes == 5 * spec.bytes_per_slot
    monkeypatch.setattr(state_module, "available_memory", lambda _: 5 * spec.bytes_per_slot - 1)
    StatePool(plain, 5, "cpu")
    with pytest.raises(OutOfMemoryError, match="give --max-slots 4 or fewer"):
        StatePool(spec, 5, "cpu")


def test_one_delayed_update_is_none() -> None:
    spec = replace(SPECS[0], delayed_updates=1)
    pool = StatePool(spec, 2, "cpu")
    assert pool.delayed is None
    assert pool.nbytes == 2 * spec.bytes_per_slot == 2 * SPECS[0].bytes_per_slot


def test_slots_are_given_once_and_come_zeroed(pool: StatePool) -> None:
    slots = [pool.allocate() for _ in range(5)]
    assert sorted(slots) == list(range(5))
    assert pool.num_free == 0
    fill(pool, 2, 7.0)
    fill(pool, 3, 8.0)
    pool.free(2)
    assert pool.num_free == 1
    assert pool.allocate() == 2
    assert holds(pool, 2, 0.0)
    assert holds(pool, 3, 8.0)


def test_a_slot_is_freed_once(pool: StatePool) -> None:
    slot = pool.allocate()
    pool.free(slot)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(slot)


def test_copy(pool: StatePool) -> None:
    for slot in range(5):
        fill(pool, slot, float(slot))
    pool.copy(1, [3, 4])
    pool.copy(0, [])
    assert [holds(pool, slot, value) for slot, value in enumerate([0, 1, 2, 1, 1])] == [True] * 5


def test_a_layer_is_a_view(pool: StatePool) -> None:
    slots = torch.arange(5, dtype=torch.int32)
    state, z = Recurrence(pool.tensors, ops.Segments(slots)).layer(1)
    state[4] = 5.0
    assert state.shape == (5, 3, 8, 16)
    assert float(pool.tensors["state"][4, 1].sum()) == 5.0 * state[4].numel()
    assert not pool.tensors["state"][:, 0].any()
    assert (z is None) == ("denominator" not in pool.tensors)
    if z is not None:
        assert z.shape == (5, 3, 16)


def test_too_large_a_pool_is_refused_with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    size = SPECS[0].bytes_per_slot
    monkeypatch.setattr(state_module, "available_memory", lambda _: 64 * 2**20 + 3 * size + 1)
    StatePool(SPECS[0], 3, "cpu", 64 * 2**20)
    with pytest.raises(OutOfMemoryError) as caught:
        StatePool(SPECS[0], 4, "cpu", 64 * 2**20)
    message = str(caught.value)
    steps = f"beside {64 * 2**20:,} for the steps"
    assert f"4 slots of {size:,} bytes need {4 * size:,} bytes, {steps}" in message
    available = f"{64 * 2**20 + 3 * size + 1:,}"
    assert f"only {available} are available: give --max-slots 3 or fewer" in message
    with pytest.raises(OutOfMemoryError, match="available: give a smaller --max-slots, free mem"):
        StatePool(SPECS[0], 4, "cpu", 2**40)


def test_where_not_one_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "available_memory", lambda _: 0)
    with pytest.raises(OutOfMemoryError, match="only 0 are available: free memory"):
        StatePool(SPECS[0], 1, "cpu")


def test_an_absurd_pool_is_refused_before_it_is_allocated() -> None:
    with pytest.raises(OutOfMemoryError, match="1000000000 slots of 3,072 bytes"):
        StatePool(SPECS[0], 10**9, "cpu")


def write_group(folder: Path, names: tuple[str, str], limit: str, used: int, cached: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    stat = (
        f"anon {used - cached}\ninactive_file {cached // 4}\nactive_file {cached - cached // 4}\n"
    )
    (folder / "memory.stat").write_text(stat)


VERSION_2 = ("memory.max", "memory.current")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def test_a_container_allows_its_limit_less_what_cannot_be_dropped(tmp_path: Path) -> None:
    write_group(tmp_path, VERSION_2, "8000", used=5000, cached=4000)
    assert state_module._container_memory(tmp_path) == 7000


def test_a_container_of_version_1(tmp_path: Path) -> None:
    write_group(tmp_path / "memory", VERSION_1, "8000", used=5000, cached=0)
    assert state_module._container_memory(tmp_path) == 3000


@pytest.mark.parametrize("limit", ["max", "", "9223372036854771712"])
def test_a_container_without_limit(tmp_path: Path, limit: str) -> None:
    write_group(tmp_path, VERSION_2, limit, used=5000, cached=100)
    assert state_module._container_memory(tmp_path) > 2**62


def test_no_container(tmp_path: Path) -> None:
    assert state_module._container_memory(tmp_path / "none") > 2**62


def test_available_memory_is_the_smaller_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < available_memory("cpu") < 2**50
    monkeypatch.setattr(state_module, "_container_memory", lambda: 12345)
    assert available_memory("cpu") == 12345


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: "MemTotal: 5 kB\n")
    with pytest.raises(OutOfMemoryError, match="does not say how much memory is available"):
        available_memory("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_available_memory_of_a_gpu() -> None:
    assert available_memory("cuda") > 0


def test_what_torch_cannot_allocate_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that /proc and the control groups do not show, such as `ulimit -v`."""
    monkeypatch.setattr("cottention.engine.state.pool.available_memory", lambda _: 2**62)
    spec = StateSpec(recurrence_tensors(layers=1, heads=1, value_width=8, key_width=8))
    with pytest.raises(OutOfMemoryError, match="could not be allocated: give a smaller"):
        StatePool(spec, 2**45, "cpu")
