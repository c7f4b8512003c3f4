"""A copy of one state on the host, perhaps still on its way from the device. Loads no torch."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, overload

if TYPE_CHECKING:
    from torch import Tensor


class Event(Protocol):
    """A point in a stream's work, as torch.cuda.Event has it."""

    def synchronize(self) -> None:
        """Wait until the stream has passed it. Any thread may."""
        ...


class StateCopy(Sequence["Tensor"]):
    """A row's tensors [L, ...] on the host, in the order of the spec.

    Whoever reads a tensor waits until it is there; length and bytes are known before.
    is_there: None where the copy is complete.
    """

    def __init__(self, tensors: Sequence["Tensor"], is_there: Event | None = None) -> None:
        self._tensors = tuple(tensors)
        self.is_there = is_there
        self.nbytes = sum(tensor.nbytes for tensor in self._tensors)

    @property
    def unread(self) -> tuple["Tensor", ...]:
        """The tensors without waiting, for work that a stream does after `is_there`."""
        return self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator["Tensor"]:
        return iter(self._complete())

    @overload
    def __getitem__(self, place: int) -> "Tensor": ...
    @overload
    def __getitem__(self, place: slice) -> "Sequence[Tensor]": ...
    def __getitem__(self, place: int | slice) -> "Tensor | Sequence[Tensor]":
        return self._complete()[place]

    def _complete(self) -> tuple["Tensor", ...]:
        if self.is_there is not None:
            self.is_there.synchronize()
        return self._tensors


def num_bytes(rows: "Sequence[Tensor]") -> int:
    """Bytes of a state's tensors, without waiting for them."""
    return rows.nbytes if isinstance(rows, StateCopy) else sum(row.nbytes for row in rows)
