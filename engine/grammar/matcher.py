"""Where choices are in their grammars, and the masks of their next ids.

A mask is packed: bit b of word w is set where id 32·w + b may be next.

Letters: R choices, W words of 32 bits for the ids of the tokenizer.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor


class MaskRow(NamedTuple):
    """A mask where it lies: row `place` of masks int32 [R, W] that were computed together."""

    masks: Tensor
    place: int


class MaskResult(NamedTuple):
    """Masks of the choices of one step, int32 [R, W]; errors: by their place, of those without."""

    masks: Tensor
    errors: dict[int, str]


class Matcher:
    """Where one choice is in its grammar. It lives as long as its choice."""

    def __init__(self, native: Any, first_mask: Tensor, end_mask: Tensor) -> None:
        """native: the library's own, of this choice alone.

        first_mask: int32 [1, W], of the first id. end_mask: int32 [W], of the ids that end a text.
        """
        self.native = native
        self._end_mask = end_mask
        self._mask = MaskRow(first_mask, 0)
        self._error = ""
        self._pending: tuple[Future[MaskResult], int] | None = None
        self.is_closed = False

    @property
    def is_ready(self) -> bool:
        """Whether `mask` does not wait."""
        return self._pending is None or self._pending[0].done()

    @property
    def pending(self) -> Future[MaskResult] | None:
        """What its next mask comes with, where that is still to be computed."""
        return None if self._pending is None else self._pending[0]

    @property
    def mask(self) -> MaskRow:
        """The ids that may be next: none after an error. Waits for the worker."""
        self._settle()
        return self._mask

    @property
    def error(self) -> str:
        """Why the grammar cannot be followed any further; empty where it can."""
        self._settle()
        return self._error

    @property
    def is_complete(self) -> bool:
        """Whether nothing but an end of the text may be next."""
        masks, place = self.mask
        return not bool((masks[place] & ~self._end_mask).any())

    def await_mask(self, result: Future[MaskResult], place: int) -> None:
        """Take the next mask from this result, at this place, when it is there."""
        self._pending = result, place

    def close(self) -> None:
        """No mask of it is wanted any more."""
        self.is_closed = True

    def _settle(self) -> None:
        if self._pending is not None:
            result, place = self._pending
            masks, errors = result.result()
            self._pending = None
            self._mask, self._error = MaskRow(masks, place), errors.get(place, "")


def num_words(num_ids: int) -> int:
    """Words of a mask for so many ids."""
    return (num_ids + 31) // 32


def packed(ids: Sequence[int], num_ids: int) -> Tensor:
    """A mask of these ids: int32 [W]."""
    bits = torch.zeros(num_words(num_ids), 32, dtype=torch.int64)
    bits.view(-1)[list(ids)] = 1
    return (bits << torch.arange(32)).sum(-1).to(torch.int32)
