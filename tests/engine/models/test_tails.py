"""Token shift: what precedes each token, wherever its sequence is cut."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.models.tails import TokenShift

ROWS, WIDTH = 6, 3
SEQUENCES = {0: 1, 2: 5, 3: 2, 5: 7}
"""Row of the pool → number of tokens of a sequence."""


def tokens(row: int) -> Tensor:
    """A sequence's, each with a number of its own."""
    numbers = 100.0 * (row + 1) + torch.arange(SEQUENCES[row])
    return numbers.unsqueeze(-1) + torch.arange(WIDTH) / 8


def before(row: int) -> Tensor:
    return torch.cat([torch.zeros(1, WIDTH), tokens(row)[:-1]])


def fed(tail: Tensor, batch: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """Feed tokens begin:stop of each row; −1 is padding of as many tokens. The rows before them."""
    rows, lengths = [row for row, _, _ in batch], [stop - begin for _, begin, stop in batch]
    segments = ops.Segments.of(rows, lengths, ROWS, "cpu", form="chunks")
    parts = [
        tokens(row)[begin:stop] if row >= 0 else torch.full((stop - begin, WIDTH), torch.nan)
        for row, begin, stop in batch
    ]
    return list(TokenShift.of(segments)(torch.cat(parts), tail).split(lengths))


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_each_token_follows_the_one_before_it(cut: int) -> None:
    """Fed in two parts, with padding among them, after another sequence has used the rows."""
    tail = torch.zeros(ROWS, 2, WIDTH)[:, 1]  # rows apart, as those of one layer are
    first = [(row, 0, min(cut, length)) for row, length in SEQUENCES.items() if cut]
    second = [(row, min(cut, n), n) for row, n in SEQUENCES.items() if n > cut]
    found: dict[int, list[Tensor]] = {row: [] for row in SEQUENCES}
    for batch in (first, [(-1, 0, 2), *second[:2], (-1, 0, 1), *second[2:]]):
        for (row, _, _), part in zip(batch, fed(tail, batch) if batch else [], strict=True):
            if row >= 0:
                found[row].append(part)
    for row in SEQUENCES:
        assert torch.equal(torch.cat(found[row]), before(row))
        assert torch.equal(tail[row], tokens(row)[-1])
    assert not tail[[1, 4]].any(), "rows that are not in the batch"


@pytest.mark.parametrize("rows", [[0, 2, 3], [2, -1, -1], [-1, 3, -1], [-1]])
def test_one_token_each(rows: list[int]) -> None:
    """As in a step that decodes, and as in a captured one, whose padding must write nothing."""
    tail = torch.arange(float(ROWS)).unsqueeze(-1).repeat(1, WIDTH)
    was = tail.clone()
    x = torch.arange(10.0, 10.0 + len(rows)).unsqueeze(-1).repeat(1, WIDTH)
    out = TokenShift.of(ops.Segments(torch.tensor(rows, dtype=torch.int32)))(x, tail)
    for place, row in enumerate(rows):
        if row >= 0:
            assert torch.equal(out[place], was[row])
            assert torch.equal(tail[row], x[place])
            was[row] = x[place]
    assert torch.equal(tail, was)
