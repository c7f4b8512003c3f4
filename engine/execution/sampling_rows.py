"""Sampling parameters and random numbers of a batch's rows, in arrays that live across steps.

A row that stays keeps its parameters; a step computes the random numbers of all rows together.

Letters: R rows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cottention.engine.sampling.random_numbers import random_key, uniform
from cottention.engine.sampling.topk_topp import GREEDY_ROW, SamplingMode, SamplingRow

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cottention.engine.scheduling.request import Choice

    Rows = tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.float64]]


class SamplingRows:
    """The rows of the choices that were sampled last.

    mode: the cheapest that is enough for all of them.
    """

    def __init__(self) -> None:
        self._choices: list[Choice] = []
        self._keys, self._modes, self._values = _empty_rows(0)
        self.mode = SamplingMode.GREEDY

    def of(
        self, choices: Sequence["Choice"], token_indices: Sequence[int]
    ) -> "NDArray[np.float64]":
        """Float64 [R, 5], as `ops.sample` takes it: valid until the next call.

        token_indices: absolute index of each choice's new token.
        """
        if self._choices != choices:
            self._replace([*choices])
        if self.mode is not SamplingMode.GREEDY:
            self._values[:, 0] = uniform(self._keys, np.array(token_indices, dtype=np.uint64))
        return self._values

    def _replace(self, choices: list["Choice"]) -> None:
        """Move the rows of choices that stay, and make those of the others."""
        before = {choice: row for row, choice in enumerate(self._choices)}
        sources = np.array([before.get(choice, -1) for choice in choices], dtype=np.int64)
        if not before:  # there is a row to take in place of those that are made below
            self._keys, self._modes, self._values = _empty_rows(1)
        self._keys, self._modes = self._keys[sources], self._modes[sources]
        self._values = self._values[sources]
        for row in (sources < 0).nonzero()[0].tolist():
            choice = choices[row]
            values = SamplingRow.of(choice.request.params)
            self._values[row], self._modes[row] = values, values.mode
            self._keys[row] = random_key(choice.request.seed, choice.index)
        self._choices = choices
        self.mode = SamplingMode(self._modes.max(initial=0))


def _empty_rows(num: int) -> "Rows":
    """Keys [R], modes [R] and values [R, 5] without meaning."""
    values = np.zeros((num, len(GREEDY_ROW)))
    return np.zeros(num, dtype=np.uint64), np.zeros(num, dtype=np.int64), values
