"""The pool: every session's state, allocated and touched once, at the start.

Owns the rows and which of them are free. Does not know what is in them or whose they are.

A slot is a row, or two where the spec has a spare: the second then is that many rows behind the
first as there are slots.

Letters: S rows, L layers, H heads, V value width, K key width. A slot's layers lie side by side,
so that a row moves in one copy.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cottention.engine.errors import OutOfMemoryError
from cottention.engine.state.spec import STATE_BYTES_PER_ELEMENT, StateSpec

_HEADROOM = {"cpu": 64 * 2**20, "cuda": 2**30}
"""Bytes that must stay free beside the pool for the steps themselves; graphs keep theirs."""


class StatePool:
    """State float32 [S, L, H, V, K] and, where the attention has one, denominators [S, L, H, K]."""

    def __init__(self, spec: StateSpec, num_slots: int, device: str) -> None:
        """Raises OutOfMemoryError before anything is allocated."""
        _check_memory(spec, num_slots, device)
        self.spec = spec
        self.num_slots = num_slots
        self.num_rows = 2 * num_slots if spec.has_spare else num_slots
        self.state = _touched((self.num_rows, *spec.state_shape), device)
        self.z: Tensor | None = None
        if spec.has_denominator:
            self.z = _touched((self.num_rows, *spec.denominator_shape), device)
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def allocate(self) -> int:
        """A slot whose first row is zero; the caller has seen that one is free."""
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

    def clear(self, row: int) -> None:
        """Make a row that of no ids."""
        for tensor in self._tensors():
            tensor[row].zero_()

    def copy(self, source: int, targets: list[int]) -> None:
        """Make the rows of `targets` equal to that of `source`."""
        for tensor in self._tensors():
            for target in targets:
                tensor[target].copy_(tensor[source])

    def read(self, row: int) -> tuple[Tensor, ...]:
        """Copies of a row's tensors on the host: state [L, H, V, K], denominator [L, H, K]."""
        return tuple(tensor[row].to("cpu", copy=True) for tensor in self._tensors())

    def write(self, row: int, values: Sequence[Tensor]) -> None:
        """Make a row what `read` gave."""
        for tensor, value in zip(self._tensors(), values, strict=True):
            tensor[row].copy_(value)

    def _tensors(self) -> list[Tensor]:
        return [self.state] if self.z is None else [self.state, self.z]


def _touched(shape: tuple[int, ...], device: str) -> Tensor:
    """Zeros float32 whose every page is written now, so that no step meets a page fault."""
    try:
        return torch.empty(shape, device=device).zero_()
    except RuntimeError as error:  # torch's own, where a limit that is not seen here holds
        size = math.prod(shape) * STATE_BYTES_PER_ELEMENT
        raise OutOfMemoryError(
            f"{size:,} bytes for the pool could not be allocated: give a smaller --max-slots"
        ) from error


def _check_memory(spec: StateSpec, num_slots: int, device: str) -> None:
    needed = spec.bytes_per_slot * num_slots
    available = available_memory(device) - _HEADROOM[torch.device(device).type]
    if needed > available:
        most = max(available, 0) // spec.bytes_per_slot
        remedy = f"give --max-slots {most} or fewer, or a smaller --state-memory"
        raise OutOfMemoryError(
            f"{num_slots} slots of {spec.bytes_per_slot:,} bytes need {needed:,} bytes and only"
            f" {max(available, 0):,} are available:"
            f" {remedy if most else 'free memory, or give the container more'}"
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

    Cached files count as used and make room when asked: weights that were just read, above all,
    must not stand in the way of the pool.
    """
    try:
        allowed = int((folder / limit).read_text())
        used = int((folder / usage).read_text())
        figures = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = int(figures["active_file"]) + int(figures["inactive_file"])
        return allowed - max(used - cached, 0)
    except (OSError, ValueError, KeyError):
        return 2**63
