"""Delayed updates of states on CUDA; without a GPU, its threads are emulated on the host.

The definition is `reference.delayed_step`; the kernel has even the bits of steps that delay none.
"""

import pytest
import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.ops import reference
from tests.engine.cuda_on_host import Place, on_host
from tests.engine.ops.test_cuda_attention_gelu import arguments_of
from tests.engine.step_cases import make

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pools(state: Tensor, capacity: int, layers: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and counts of a layer of several; NaN where nothing has been written."""
    slots, heads, value, key = state.shape
    keys, values = (
        torch.full((slots, capacity, layers, heads, n), float("nan"), device=state.device)
        for n in (key, value)
    )
    counts = torch.zeros(slots + 1, dtype=torch.int32, device=state.device)
    return keys[:, :, layers - 1], values[:, :, layers - 1], counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_the_bits_are_those_of_steps_that_delay_nothing(
    place: Place, capacity: int, width: int, dtype: torch.dtype
) -> None:
    """Seven steps of slots that begin at different times; then what is left is folded."""
    namespace, device = place
    plain = [
        None if x is None else x.to(device)
        for x in arguments_of([1, 1, 1], [4, -1, 0], width, 12, 8, dtype)
    ]
    joined, *angles, state, slots, _, out = plain
    assert joined is not None
    assert state is not None
    assert slots is not None
    assert out is not None
    delayed_state, delayed_out = state.clone(), out.clone()
    keys, values, counts = pools(delayed_state, capacity, layers=2)
    for step in range(7):
        if step == 2:
            slots = slots.new_tensor([4, 7, 0])
        joined = joined.roll(1, 1)
        namespace.cottention_attention_gelu(joined, *angles, state, slots, None, out)
        namespace.cottention_delayed_gelu(
            joined, *angles, delayed_state, keys, values, counts, slots, delayed_out
        )
        assert torch.equal(delayed_out, out), step
        rows = slots.long().remainder(len(counts))
        counts[rows] = (counts[rows] + 1) % capacity
    wanted = torch.tensor([-1, 7, 0, 4, 99], dtype=torch.int32, device=device)
    namespace.fold_updates(delayed_state, keys, values, counts, wanted)
    assert torch.equal(delayed_state, state)


def test_the_definition_is_the_recurrence() -> None:
    case = make([1, 1], [3, 1], 8, 16, pool_size=5).to(torch.float64)
    plain, delayed = case.to(torch.float64), case.state.clone()
    keys, values, counts = (x.double() for x in pools(delayed, 3))
    keys, values, counts = keys.nan_to_num(), values.nan_to_num(), counts.int()
    for step in range(5):
        q, k, v = (x.roll(step, -1) for x in case[:3])
        expected = reference.recurrent_step(q, k, v, plain.state, None, case.state_indices)
        out = reference.delayed_step(q, k, v, delayed, keys, values, counts, case.state_indices)
        torch.testing.assert_close(out, expected)
        counts[case.state_indices.long()] = (counts[case.state_indices.long()] + 1) % 3
    ops.fold_updates(delayed, keys, values, counts, torch.tensor([1, 3], dtype=torch.int32))
    torch.testing.assert_close(delayed, plain.state)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("counts", "counts must have one for each of 9 slots"),
        ("keys", r"keys.size\(0\) must be 9"),
        ("values", r"values.size\(3\) must be 16"),
        ("rows", "rows has the wrong dtype"),
    ],
)
def test_wrong_arguments_are_refused_on_the_host(name: str, message: str) -> None:
    state = torch.zeros(9, 2, 16, 16)
    keys, values, counts = pools(state, 3)
    rows = torch.tensor([1], dtype=torch.int32)
    given = {"state": state, "keys": keys, "values": values, "counts": counts, "rows": rows}
    wrong = {"counts": counts[:3], "keys": keys[:2], "values": values[..., :8], "rows": rows.long()}
    with pytest.raises(RuntimeError, match=message):
        on_host().fold_updates(**given | {name: wrong[name]})


@pytest.mark.parametrize(("given", "number"), [("", 0), ("0", 0), ("8", 8)])
def test_the_switch(monkeypatch: pytest.MonkeyPatch, given: str, number: int) -> None:
    monkeypatch.setenv("COTTENTION_DELAYED_UPDATES", given)
    assert ops.num_delayed_updates() == number
    for wrong in ("-1", "all", "65"):
        monkeypatch.setenv("COTTENTION_DELAYED_UPDATES", wrong)
        with pytest.raises(ValueError, match="must be a whole number from 0 to 64"):
            ops.num_delayed_updates()
