"""Copies of states on a GPU: of the moment at which they were asked for, and nobody waits."""

import pytest
import torch

from cottention.engine.state.copies import copies_on


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_on_a_gpu_are_of_their_moment_and_do_not_wait() -> None:
    copies = copies_on("cuda")
    pool = torch.zeros(2, 2**20, device="cuda")
    copies.read([pool[0]])[0]  # pinned memory is allocated, which waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        taken = []
        for number in range(20):
            pool[0] += 1
            taken.append((copies.read([pool[0]]), number + 1))
        copies.write([pool[1]], taken[4][0])
        pool[1] += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all((copy[0] == number).all() for copy, number in taken)
    assert (pool[1] == 6).all()
