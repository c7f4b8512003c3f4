"""The pool of states: one tensor [S, L, ...] for each tensor of the spec, allocated at the start.

A slot is a row of all of them, or two where the spec has a spare: the spare's row is `num_slots`
behind the first. A row's layers are contiguous, so that a row moves in one copy for each tensor.

Letters: S rows, L layers.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.errors import OutOfMemoryError
from cottention.engine.state.copies import copies_on
from cottention.engine.state.delayed_updates import DelayedUpdates
from cottention.engine.state.spec import StateSpec, StateTensor
from cottention.engine.state.state_copy import StateCopy


class StatePool:
    """Rows of states, and which slots are free. `tensors`: by name, each [S, L, ...].

    delayed: what steps have added to rows and not written there; None: they write every token.
    """

    def __init__(
        self,
        spec: StateSpec,
        num_slots: int,
        device: str,
        reserve: int = 0,
    ) -> None:
        """reserve: bytes that must stay free beside the pool, for the steps themselves.

        Raises OutOfMemoryError before anything is allocated.
        """
        _check_memory(spec, num_slots, device, reserve)
        self.spec = spec
        self.num_slots = num_slots
        self.num_rows = 2 * num_slots if spec.has_spare else num_slots
        self.tensors = {
            tensor.name: _allocated(tensor, self.num_rows, device) for tensor in spec.tensors
        }
        self.delayed: DelayedUpdates | None = None
        if spec.delayed_updates > 1:
            self.delayed = DelayedUpdates(self.tensors["state"], spec.delayed_updates)
        self._copies = copies_on(device)
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Slots that are free."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool."""
        delayed = 0 if self.delayed is None else self.delayed.nbytes
        return delayed + sum(tensor.nbytes for tensor in self.tensors.values())

    def allocate(self) -> int:
        """A slot whose first row is zero. The caller has checked that one is free."""
        slot = self._free.pop()
        self.clear(slot)
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back, once."""
        assert slot not in self._free, f"slot {slot} was freed twice"
        self._free.append(slot)

    def rows_of(self, slot: int) -> list[int]:
        """A slot's row, and the spare one where there is one."""
        return list(range(slot, self.num_rows, self.num_slots))

    def settle(self, rows: Sequence[int]) -> None:
        """Write to the rows what has been delayed, for whoever reads them; −1 is padding."""
        if self.delayed is not None:
            self.delayed.settle(rows)

    def _overwrite(self, row: int) -> None:
        """Forget what has been delayed of a row, which gets another value."""
        if self.delayed is not None:
            self.delayed.drop(row)

    def clear(self, row: int) -> None:
        """Set a row to the state before the first token: zeros."""
        self._overwrite(row)
        for tensor in self.tensors.values():
            tensor[row].zero_()

    def copy(self, source: int, targets: list[int]) -> None:
        """Copy the row `source` to the rows `targets`."""
        self.settle([source])
        for target in targets:
            self._overwrite(target)
        for tensor in self.tensors.values():
            for target in targets:
                tensor[target].copy_(tensor[source])

    def read(self, row: int) -> StateCopy:
        """A copy of a row's tensors [L, ...] on the host, in the order of the spec.

        Does not wait for the device: whoever reads the copy does.
        """
        self.settle([row])
        return self._copies.read([tensor[row] for tensor in self.tensors.values()])

    def write(self, row: int, values: Sequence[Tensor]) -> None:
        """Set a row to what `read` returned."""
        self._overwrite(row)
        self._copies.write([tensor[row] for tensor in self.tensors.values()], values)


def _allocated(tensor: StateTensor, num_rows: int, device: str) -> Tensor:
    """Zeros [S, L, ...]. Every page is written now, so that no step has a page fault."""
    try:
        return ops.zeros((num_rows, *tensor.shape), device)
    except RuntimeError as error:  # torch's own, under a limit that `available_memory` cannot see
        raise OutOfMemoryError(
            f"{num_rows * tensor.nbytes:,} bytes for the pool could not be allocated:"
            " give a smaller --max-slots"
        ) from error


def _check_memory(spec: StateSpec, num_slots: int, device: str, reserve: int) -> None:
    needed = spec.bytes_per_slot * num_slots
    available = available_memory(device)
    if needed > available - reserve:
        most = max(available - reserve, 0) // spec.bytes_per_slot
        remedy = f"give --max-slots {most} or fewer, or a smaller --state-memory"
        fewer = "" if num_slots == 1 else "give a smaller --max-slots, "
        steps = f", beside {reserve:,} for the steps," if reserve else ""
        raise OutOfMemoryError(
            f"{num_slots} slots of {spec.bytes_per_slot:,} bytes need {needed:,} bytes{steps} and"
            f" only {available:,} are available:"
            f" {remedy if most else f'{fewer}free memory, or give the container more'}"
        )


def available_memory(device: str) -> int:
    """Bytes that can be allocated on `device` now, within the container's limit if there is one."""
    if device.startswith("cuda"):
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return min(_system_memory(), _container_memory())


def _system_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise OutOfMemoryError("/proc/meminfo does not say how much memory is available")


def _container_memory(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """What a control group, of version 2 or 1, still allows."""
    version_2 = _group_memory(folder, "memory.max", "memory.current")
    version_1 = _group_memory(folder / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
    return min(version_2, version_1)


def _group_memory(folder: Path, limit: str, usage: str) -> int:
    """Limit less use; without a limit, a number larger than any memory.

    Cached files, such as weights that were just read, count as free: the kernel drops them when
    memory is needed.
    """
    try:
        allowed = int((folder / limit).read_text())
        used = int((folder / usage).read_text())
        figures = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = int(figures["active_file"]) + int(figures["inactive_file"])
        return allowed - max(used - cached, 0)
    except (OSError, ValueError, KeyError):
        return 2**63
