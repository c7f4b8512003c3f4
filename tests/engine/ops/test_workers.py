"""The threads of the compiled ops: a step does not depend on which of them come, and when."""

import multiprocessing
import threading
from collections.abc import Iterator

import pytest
import torch

from cottention.engine import ops

pytestmark = pytest.mark.skipif(ops.backend() != "compiled", reason="needs the compiled ops")

ROWS, CHANNELS, COLUMNS = 64, 128, 1024


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(COLUMNS, CHANNELS, generator=generator)
    packed: torch.Tensor = torch.ops.cottention.pack_weight(weight)
    return torch.randn(ROWS, CHANNELS, generator=generator), packed


def product(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """A product of many tasks."""
    out: torch.Tensor = torch.ops.cottention.linear(x, packed, None, COLUMNS)
    return out


def test_threads_that_call_ops_at_once_do_not_mix_their_jobs() -> None:
    """One has the workers, the others do without."""
    given = operands()
    expected, found = product(*given), []

    def work() -> None:
        found.extend(product(*given) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == 200
    assert all(torch.equal(each, expected) for each in found)


def test_more_threads_may_be_asked_for_later_and_fewer_again() -> None:
    given = operands()
    expected = product(*given)
    for number in (1, 5, 2, 8, 3):
        torch.set_num_threads(number)
        assert all(torch.equal(product(*given), expected) for _ in range(20))


def test_a_forked_process_has_threads_of_its_own() -> None:
    """It inherits the memory of those of its parent, and none of them: it must not wait for one."""
    given = operands()
    expected = product(*given)

    def in_child() -> None:  # nothing that uses torch's own threads, which a fork does not survive
        found = product(*given)
        raise SystemExit(0 if found.numpy().tobytes() == expected.numpy().tobytes() else 1)

    child = multiprocessing.get_context("fork").Process(target=in_child)
    child.start()
    child.join(60)
    child.kill()
    assert child.exitcode == 0
