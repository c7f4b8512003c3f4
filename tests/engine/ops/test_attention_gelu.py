"""cottention_attention_gelu equals its three ops in turn, bit for bit, in any batch."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.ops import reference

INNER = 37


class Case(NamedTuple):
    """Arguments of the op, in its order."""

    joined: Tensor
    positions: Tensor
    sigma: Tensor
    cos: Tensor
    sin: Tensor
    state: Tensor
    state_indices: Tensor
    cu_seqlens: Tensor | None
    out: Tensor

    def rows(self, start: int, stop: int, segment: int) -> "Case":
        """One segment alone, on a copy of the pool."""
        at = slice(start, stop)
        return self._replace(
            joined=self.joined[at].clone(),
            positions=self.positions[at],
            cos=self.cos[at],
            sin=self.sin[at],
            state=self.state.clone(),
            state_indices=self.state_indices[segment : segment + 1],
            cu_seqlens=torch.tensor([0, stop - start], dtype=torch.int32),
            out=self.out[at].clone(),
        )


def make(
    lengths: list[int], state_indices: list[int], width: int, heads: int = 3, inner: int = INNER
) -> Case:
    """Segments on a full pool; the output is poisoned."""
    generator = torch.Generator().manual_seed(width + sum(lengths))
    tokens, channels = sum(lengths), heads * width
    positions = torch.randint(0, 1_000_000, (tokens,), generator=generator)
    table = ops.rotary_table(positions, width // 2 // 2 * 2, 1e4, torch.float32)
    pool = torch.randn(9, 2, heads, width, width, generator=generator)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return Case(
        torch.randn(tokens, 3 * channels + inner, generator=generator),
        positions,
        torch.rand(heads, dtype=torch.float64, generator=generator),
        *table,
        pool[:, 1],
        torch.tensor(state_indices, dtype=torch.int32),
        ends,
        torch.full((tokens, channels + inner), float("nan")),
    )


def apart(case: Case) -> tuple[Tensor, Tensor]:
    """Output and pool by the three ops."""
    state = case.state.clone()
    heads, width = state.shape[1:3]
    *qkv, up = case.joined.split(
        [heads * width] * 3 + [case.joined.shape[1] - 3 * heads * width], 1
    )
    q, k, v = (x.unflatten(1, (heads, width)) for x in qkv)
    features = ops.cottention_features(q, k, v, case.positions, case.sigma, case.cos, case.sin)
    out = ops.recurrent_step(*features, state, None, case.state_indices, case.cu_seqlens)
    return torch.cat([out.flatten(1), ops.gelu_new(up)], dim=1), state


@pytest.mark.parametrize("width", [8, 16, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [40, 0, 1, 70]])
def test_equal_bits_to_its_parts(width: int, lengths: list[int]) -> None:
    case = make(lengths, [5, -1, 0, 7][: len(lengths)], width)
    out, state = apart(case)
    ops.cottention_attention_gelu(*case)
    assert torch.equal(case.out, out)
    assert torch.equal(case.state, state)


@pytest.mark.parametrize("inner", [0, 1, 16, 300])
def test_any_width_of_the_mlp(inner: int) -> None:
    case = make([2, 3], [1, 4], 16, inner=inner)
    out, _ = apart(case)
    ops.cottention_attention_gelu(*case)
    assert torch.equal(case.out, out)


def test_close_to_float64() -> None:
    case = make([3, 1, 9], [2, 0, 8], 64)
    exact = [x.double() if x.is_floating_point() else x for x in case if x is not None]
    joined, positions, sigma, cos, sin, state, state_indices, cu_seqlens, _ = exact
    q, k, v = (x.unflatten(1, (3, 64)) for x in joined[:, :576].split(192, 1))
    features = reference.cottention_features(q, k, v, positions, sigma, cos, sin)
    out = reference.recurrent_step(*features, state, None, state_indices, cu_seqlens).flatten(1)
    ops.cottention_attention_gelu(*case)
    torch.testing.assert_close(case.out[:, :192].double(), out, rtol=1e-5, atol=2e-6)
    gelu = reference.gelu_new(joined[:, 576:])
    torch.testing.assert_close(case.out[:, 192:].double(), gelu, rtol=1e-6, atol=1e-6)


def test_bits_do_not_depend_on_batch_or_threads() -> None:
    lengths, state_indices = [1, 33, 2, 1], [3, 0, 6, 8]
    together = make(lengths, state_indices, 64)
    parts, start = [], 0
    for segment, length in enumerate(lengths):
        parts.append(together.rows(start, start + length, segment))
        start += length
    ops.cottention_attention_gelu(*together)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for part in parts:
            ops.cottention_attention_gelu(*part)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat([part.out for part in parts]), together.out)
    for part, slot in zip(parts, state_indices, strict=True):
        assert torch.equal(part.state[slot], together.state[slot])


def test_one_token_each_needs_no_cu_seqlens() -> None:
    case = make([1, 1, 1], [2, -1, 5], 32)
    single = case._replace(cu_seqlens=None, state=case.state.clone(), out=case.out.clone())
    ops.cottention_attention_gelu(*case)
    ops.cottention_attention_gelu(*single)
    assert torch.equal(single.out, case.out)


def test_no_tokens() -> None:
    case = make([], [], 16)
    ops.cottention_attention_gelu(*case)
    assert case.out.shape == (0, 48 + INNER)


def test_opcheck() -> None:
    assert ops.backend() == "compiled"
    case = make([2, 1], [3, -1], 16)._replace(out=torch.zeros(3, 48 + INNER))
    torch.library.opcheck(torch.ops.cottention.cottention_attention_gelu.default, case)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("joined", lambda x: x[:, :100], "joined"),
        ("joined", lambda x: x.double(), "joined has the wrong dtype"),
        ("joined", lambda x: x[:2], r"out.size\(0\)"),
        ("positions", lambda x: x[:2], "positions"),
        ("sigma", lambda x: x[:2], "sigma"),
        ("sigma", lambda x: x.float(), "sigma has the wrong dtype"),
        ("cos", lambda x: x.repeat(1, 3), "sin"),
        ("state", lambda x: x[:, :, :8], "state"),
        ("state", lambda x: x.transpose(2, 3), "contiguous behind"),
        ("state_indices", lambda x: x.fill_(9), "out of range"),
        ("state_indices", lambda x: x.fill_(1), "named twice"),
        ("cu_seqlens", lambda x: x.flip(0), "cu_seqlens"),
        ("out", lambda x: x[:, 1:], "out"),
        ("out", lambda x: x.T.contiguous().T, "contiguous"),
    ],
)
def test_wrong_arguments_are_refused_before_memory_is_touched(
    name: str, wrong: Callable[[Tensor], Tensor], message: str
) -> None:
    case = make([2, 3], [1, 0], 16)
    before = case.state.clone()
    with pytest.raises(RuntimeError, match=message):
        ops.cottention_attention_gelu(*case._replace(**{name: wrong(getattr(case, name).clone())}))
    assert torch.equal(case.state, before)


def test_heads_of_a_width_without_a_kernel_are_refused() -> None:
    with pytest.raises(RuntimeError, match="width 20"):
        ops.cottention_attention_gelu(*make([1], [0], 20))
