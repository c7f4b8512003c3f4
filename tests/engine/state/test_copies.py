"""Copies of states beside a step that goes on: with streams that do their work as late as they may.

A fake stream does what it was given when somebody waits for it, or when chance has it, in any order
that its waits allow: a copy that relies on more than an event gives another value.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cottention.engine.state.copies import ImmediateCopies, StreamedCopies
from cottention.engine.state.session_state import SessionState
from cottention.engine.state.state_copy import StateCopy


class Device:
    """Streams, of which any may go on."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.streams: list[FakeStream] = []
        self.num_waits = 0

    def stream(self) -> "FakeStream":
        self.streams.append(FakeStream(self))
        return self.streams[-1]

    def go_on(self) -> None:
        """Do one piece of work of some stream."""
        able = [stream for stream in self.streams if stream.is_able]
        if able:
            self.chance.choice(able).go_on()


@dataclass
class FakeEvent:
    stream: "FakeStream"
    number: int

    @property
    def is_passed(self) -> bool:
        return self.stream.num_done >= self.number

    def synchronize(self) -> None:
        self.stream.device.num_waits += not self.is_passed
        while not self.is_passed:
            self.stream.device.go_on()


class FakeStream:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.given: deque[Callable[[], None] | FakeEvent] = deque()
        self.num_given = self.num_done = 0

    def run(self, work: Callable[[], None], _tensors: Sequence[Tensor]) -> None:
        self.give(work)

    def wait(self, event: FakeEvent) -> None:
        self.give(event)

    def give(self, work: Callable[[], None] | FakeEvent) -> None:
        self.given.append(work)
        self.num_given += 1

    def record(self) -> FakeEvent:
        return FakeEvent(self, self.num_given)

    @property
    def is_able(self) -> bool:
        """Whether its next work may be done."""
        work = self.given[0] if self.given else None
        return work is not None and (not isinstance(work, FakeEvent) or work.is_passed)

    def go_on(self) -> None:
        work = self.given.popleft()
        if not isinstance(work, FakeEvent):
            work()
        self.num_done += 1


def row_of(pool: Tensor, row: int) -> list[Tensor]:
    return [pool[row, :2], pool[row, 2:]]


@pytest.mark.parametrize("seed", range(40))
def test_copies_are_of_the_moment_at_which_they_were_asked_for(seed: int) -> None:
    """Steps change rows, copies are taken, put into other rows, and read in any order."""
    device, chance = Device(seed), random.Random(seed)
    computing = device.stream()
    copies = StreamedCopies(computing, device.stream(), is_pinned=False)
    pool, model = torch.zeros(4, 3), torch.zeros(4, 3)
    taken: list[tuple[StateCopy, Tensor]] = []
    for number in range(60):
        row, verb = chance.randrange(4), chance.choice(["step", "read", "write", "check", "go on"])
        if verb == "step":
            change = float(number + 1)
            computing.run(lambda row=row, change=change: pool[row].mul_(3).add_(change), [])
            model[row] = 3 * model[row] + change
        elif verb == "read":
            taken.append((copies.read(row_of(pool, row)), model[row].clone()))
        elif verb == "write" and taken:
            copy, expected = chance.choice(taken)
            copies.write(row_of(pool, row), copy)
            model[row] = expected
        elif verb == "check" and taken:
            copy, expected = chance.choice(taken)
            assert torch.equal(torch.cat([*copy]), expected)
        elif verb == "go on":
            device.go_on()
    computing.record().synchronize()
    assert torch.equal(pool, model)
    assert all(torch.equal(torch.cat([*copy]), expected) for copy, expected in taken)


def test_nobody_waits_but_who_reads() -> None:
    """Neither taking a copy, nor its bytes, nor a session of it, nor putting it into a row."""
    device = Device(0)
    computing = device.stream()
    copies = StreamedCopies(computing, device.stream(), is_pinned=False)
    pool = torch.ones(2, 3)
    computing.run(lambda: pool[0].add_(1), [])
    copy = copies.read(row_of(pool, 0))
    computing.run(lambda: pool[0].zero_(), [])
    copies.write(row_of(pool, 1), copy)
    state = SessionState(pending=(1, 2)).fed(copy, 1)
    assert (len(copy), copy.nbytes, state.nbytes, bool(state.rows)) == (2, 12, 12, True)
    assert device.num_waits == computing.num_done == 0
    assert copy[0].tolist() == [2, 2]
    assert device.num_waits == 1
    computing.record().synchronize()
    assert pool.tolist() == [[0, 0, 0], [2, 2, 2]]


def test_a_state_from_elsewhere_is_written_in_its_turn() -> None:
    device = Device(0)
    computing = device.stream()
    copies = StreamedCopies(computing, device.stream(), is_pinned=False)
    pool = torch.zeros(1, 3)
    computing.run(lambda: pool[0].add_(5), [])
    copies.write(row_of(pool, 0), [torch.ones(2), torch.ones(1)])
    computing.run(lambda: pool[0].add_(1), [])
    computing.record().synchronize()
    assert pool.tolist() == [[2, 2, 2]]


def test_on_the_cpu_a_copy_is_there_at_once() -> None:
    pool = torch.ones(1, 3)
    copy = ImmediateCopies().read(row_of(pool, 0))
    pool.zero_()
    assert [part.tolist() for part in copy] == [[1, 1], [1]]
    ImmediateCopies().write(row_of(pool, 0), copy)
    assert pool.tolist() == [[1, 1, 1]]
