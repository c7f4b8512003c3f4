"""Where choices are in their grammars, and the masks of their next ids.

Masks are computed in a thread beside the engine's, while that runs the model: `MaskWorker` is told
which ids were sampled, and has the next masks ready when the next ids are to be sampled.

A mask is packed: bit b of word w is set where id 32·w + b may be next.

Letters: R choices, W words of 32 bits for the ids of the tokenizer.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor


class MaskResult(NamedTuple):
    """Masks of the choices of one step, int32 [R, W]; errors: by their place, of those without."""

    masks: Tensor
    errors: dict[int, str]


class Matcher:
    """Where one choice is in its grammar. It lives as long as its choice."""

    def __init__(self, native: Any, first_mask: Tensor, end_mask: Tensor) -> None:
        """native: the library's own, of this choice alone.

        first_mask, end_mask: int32 [W], of the first id, and of the ids that end a text.
        """
        self.native = native
        self._end_mask = end_mask
        self._mask = first_mask
        self._error = ""
        self._pending: tuple[Future[MaskResult], int] | None = None

    @property
    def mask(self) -> Tensor:
        """The ids that may be next, int32 [W]: none after an error. Waits for the worker."""
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
        return not bool((self.mask & ~self._end_mask).any())

    def await_mask(self, result: Future[MaskResult], place: int) -> None:
        """Take the next mask from this result, at this place, when it is there."""
        self._pending = result, place

    def _settle(self) -> None:
        if self._pending is not None:
            result, place = self._pending
            masks, errors = result.result()
            self._pending = None
            self._mask, self._error = masks[place], errors.get(place, "")


class MaskWorker:
    """The thread that advances matchers. It starts with the first of them."""

    def __init__(self, num_ids: int) -> None:
        self._num_words = num_words(num_ids)
        self._thread: ThreadPoolExecutor | None = None
        self._executor: Any = None

    def advance(self, sampled: Sequence[tuple[Matcher, int]]) -> None:
        """Begin to advance each matcher by the id that was sampled for it."""
        if not sampled:
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="masks")
        natives = [(matcher.native, token_id) for matcher, token_id in sampled]
        result = self._thread.submit(self._advance, natives)
        for place, (matcher, _) in enumerate(sampled):
            matcher.await_mask(result, place)

    def close(self) -> None:
        """End the thread when it has done its work."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread = None

    def _advance(self, sampled: Sequence[tuple[Any, int]]) -> MaskResult:
        """Two calls for all choices, which run without the interpreter's lock."""
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor(max(1, (os.cpu_count() or 1) // MASK_THREADS_PER_CPU))
        self._executor.consume_token_par(sampled)
        masks = torch.zeros(len(sampled), self._num_words, dtype=torch.int32)
        places = [(native, place) for place, (native, _) in enumerate(sampled)]
        self._executor.unsafe_compute_mask_ptr(
            places, masks.data_ptr(), 4 * self._num_words, len(sampled)
        )
        errors = {place: str(native.get_error()) for native, place in places if native.is_error()}
        if errors:
            masks[[*errors]] = 0
        return MaskResult(masks, errors)


MASK_THREADS_PER_CPU = 4
"""A thread for masks beside four of the model's: masks take a small part of a step."""


def num_words(num_ids: int) -> int:
    """Words of a mask for so many ids."""
    return (num_ids + 31) // 32


def packed(ids: Sequence[int], num_ids: int) -> Tensor:
    """A mask of these ids: int32 [W]."""
    bits = torch.zeros(num_words(num_ids), 32, dtype=torch.int64)
    bits.view(-1)[list(ids)] = 1
    return (bits << torch.arange(32)).sum(-1).to(torch.int32)
