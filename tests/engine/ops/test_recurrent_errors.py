"""Arguments that recurrent_step refuses before it changes memory, compiled and reference alike."""

import pytest
import torch
from torch import Tensor

from cottention.engine import ops
from tests.engine.step_cases import make


def _int(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


WRONG = {
    "out of range": lambda c: c._replace(state_indices=_int(12, 1)),
    "named twice": lambda c: c._replace(state_indices=_int(1, 1)),
    "must rise from 0 to 5": lambda c: c._replace(cu_seqlens=_int(0, 2, 4)),
    "cu_seqlens must rise": lambda c: c._replace(cu_seqlens=_int(0, 6, 5)),
    "one state index per token": lambda c: c._replace(cu_seqlens=None),
    "cu_seqlens": lambda c: c._replace(cu_seqlens=_int(0, 5)),
    "state_indices": lambda c: c._replace(state_indices=c.state_indices.long()),
    r"\bk\b": lambda c: c._replace(k=c.k[:, :1]),
    r"\bv\b": lambda c: c._replace(v=c.v[:3]),
    "state": lambda c: c._replace(state=c.state[..., :8]),
    r"\bz\b": lambda c: c._replace(z=c.state[:, :, 0, :8]),
    "dimensions|shape": lambda c: c._replace(v=c.v.flatten(1)),
    "k has the wrong dtype": lambda c: c._replace(k=c.k.half()),
    "v has the wrong dtype": lambda c: c._replace(q=c.q.half(), k=c.k.half()),
    "(k|q) has the wrong dtype|q must be": lambda c: c._replace(q=c.q.int()),
    "state has the wrong dtype": lambda c: c._replace(state=c.state.bfloat16()),
    "z has the wrong dtype": lambda c: c._replace(z=c.z.double()),
    "has rows that overlap": lambda c: c._replace(state=c.state[:1].expand_as(c.state)),
    "z has rows that overlap": lambda c: c._replace(z=c.z[:1].expand_as(c.z)),
    "q must have 3 dimensions": lambda c: c._replace(q=c.q.flatten(1)),
    "one device": lambda c: c._replace(state=c.state.to("meta")),
}


@pytest.mark.parametrize("width", [16, 12])
@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused_before_memory_is_touched(message: str, width: int) -> None:
    case = make([2, 3], [1, 0], width, width, denominator=True)
    before = case.state.clone()
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.recurrent_step(*WRONG[message](case))
    assert torch.equal(case.state, before)


@pytest.mark.parametrize(
    ("message", "name"),
    [("dtype", "state"), ("contiguous", "q"), ("contiguous behind", "state"), ("overlap", "state")],
)
def test_the_kernel_refuses_unsupported_layouts(message: str, name: str) -> None:
    case = make([2, 3], [1, 0], 16, 16)
    wrong = {
        "dtype": case.state.double(),
        "contiguous": case.q.transpose(1, 2).contiguous().transpose(1, 2),
        "contiguous behind": case.state.transpose(2, 3),
        "overlap": case.state[:1].expand_as(case.state),
    }[message]
    with pytest.raises(RuntimeError, match=message):
        ops.recurrent_step(*case._replace(**{name: wrong}))
