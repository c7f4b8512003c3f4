"""Arguments for recurrent_step as the engine makes them: slices of one projection, a full pool."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor


class Case(NamedTuple):
    """Arguments of the op, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: Tensor
    z: Tensor | None
    state_indices: Tensor
    cu_seqlens: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Case":
        """Copies, floats in `dtype`."""
        kinds = [x if x is None or not x.is_floating_point() else x.to(dtype) for x in self]
        return Case(*(None if x is None else x.clone() for x in kinds))


def make(
    lengths: list[int],
    state_indices: list[int],
    key: int = 64,
    value: int = 64,
    heads: int = 2,
    *,
    denominator: bool = False,
    pool_size: int = 12,
) -> Case:
    """Segments of the given lengths as slices of one stacked projection, on a pool that is full."""
    generator = torch.Generator().manual_seed(key * 1000 + value + len(lengths))
    tokens = sum(lengths)
    stacked = torch.rand(tokens, heads * (2 * key + value) + 5, generator=generator)
    q = stacked[:, : heads * key].view(tokens, heads, key)
    k = stacked[:, heads * key : 2 * heads * key].view(tokens, heads, key)
    v = stacked[:, 2 * heads * key : -5].view(tokens, heads, value) - 0.5
    pool = torch.randn(pool_size, 3, heads, value, key, generator=generator)
    z = torch.rand(pool_size, 3, heads, key, generator=generator)[:, 1] if denominator else None
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    return Case(q, k, v, pool[:, 1], z, torch.tensor(state_indices, dtype=torch.int32), cu_seqlens)


def assert_pools(case: Case, before: Case, exact: Case, **tolerances: float) -> None:
    """The rows of the case's pools that a step was for are those of `exact`, others as before."""
    untouched = torch.ones(len(case.state), dtype=torch.bool)
    untouched[case.state_indices[case.state_indices >= 0].long()] = False
    pools = zip(case[3:5], before[3:5], exact[3:5], strict=True)
    for after, earlier, expected in pools:
        if after is not None and earlier is not None and expected is not None:
            torch.testing.assert_close(after.double(), expected, **tolerances)
            assert torch.equal(after[untouched], earlier[untouched])


FORMS = ["w-head", "w-key", "ab", "w-head ab", "w-key ab"]


class Terms(NamedTuple):
    """w, a and b of some form; slices of something wider, as a model's projections are."""

    w: Tensor | None
    a: Tensor | None
    b: Tensor | None

    def part(self, start: int, stop: int) -> dict[str, Tensor | None]:
        named = self._asdict()
        return {name: None if x is None else x[start:stop] for name, x in named.items()}

    def double(self) -> dict[str, Tensor | None]:
        return {name: None if x is None else x.double() for name, x in self._asdict().items()}


def terms_of(form: str, case: Case) -> Terms:
    """a is minus a unit vector and b a part of it: what is removed from the state does not grow."""
    tokens, heads, key = case.q.shape
    generator = torch.Generator().manual_seed(tokens + key)
    wide = torch.rand(tokens, heads, 3 * key + 3, generator=generator)
    unit = torch.nn.functional.normalize(wide[..., :key] - 0.5, dim=-1)
    w = None
    if "w-head" in form:
        w = 0.5 + wide[..., -1] / 2
    if "w-key" in form:
        w = 0.5 + wide[..., key : 2 * key] / 2
    if "ab" not in form:
        return Terms(w, None, None)
    return Terms(w, -unit, unit * wide[..., 2 * key : 3 * key])


FAR_ROWS = 1100
FAR_SHAPE = 16, 256, 512  # H, V, K: rows from 1024 on begin beyond 2^31 elements


def far_pools(device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Pools [S, H, V, K] with equal last rows: a small one, and one of 9 GB that is not touched.

    Skips the test if that much memory cannot be reserved.
    """
    near = torch.randn(1, *FAR_SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        far = torch.empty(FAR_ROWS, *FAR_SHAPE, device=device)
    except RuntimeError as error:
        pytest.skip(f"no 9 GB of address space: {error}")
    far[-1] = near[0]
    return near, far
