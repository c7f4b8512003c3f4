"""DRY, a penalty on ids that would go on with a repetition, under llama.cpp's parameters.

With h the last `size` ids of prompt and text, an id x that followed an earlier h[j] is penalized by

    multiplier · base^(m − allowed_length),

where m, at least allowed_length, is how many ids up to j are the same as the last ids of h; of
several places the longest m counts, and one above MAX_REPEAT counts as that. A repetition does not
reach across a breaker, an id whose text has one of the breaker strings, and none is penalized.

The penalty is a function of these ids alone. A step costs a few operations on arrays of `size`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cottention.engine.sampling_params import SamplingParams

MAX_REPEAT = 64
MAX_SIZE = 4096
"""Longest part of a sequence in which repetitions are looked for."""

MAX_PENALTY = 1e30
"""Penalties beyond are clamped: logits stay finite."""

_BETWEEN = b"\xff"
"""Is between tokens where they are searched; no text has this byte in UTF-8."""


@dataclass(frozen=True, slots=True, eq=False)
class RepeatRules:
    """What a request says about repetitions.

    is_breaker: bool [N], for each id. penalties: float32 [MAX_REPEAT + 1], by the length of a
    repetition; 0 where it is allowed. size: how many ids are looked at.
    """

    is_breaker: "NDArray[np.bool_]"
    penalties: "NDArray[np.float32]"
    size: int

    @classmethod
    def of(
        cls, params: "SamplingParams", is_breaker: "NDArray[np.bool_]", window: int
    ) -> "RepeatRules | None":
        """Those of a request; None if it has none. window: ids that a session keeps."""
        num = window if params.dry_penalty_last_n == -1 else params.dry_penalty_last_n
        size = min(num, window, MAX_SIZE)
        if not params.has_dry or size < 2:
            return None
        penalties = [_penalty(params, length) for length in range(MAX_REPEAT + 1)]
        return cls(is_breaker, np.array(penalties, dtype=np.float32), size)


def _penalty(params: "SamplingParams", length: int) -> float:
    if length < params.dry_allowed_length:
        return 0.0
    try:
        growth = params.dry_base ** (length - params.dry_allowed_length)
    except OverflowError:
        return MAX_PENALTY
    return float(min(params.dry_multiplier * growth, MAX_PENALTY))


class RepeatPenalties(NamedTuple):
    """Ids int64 [M], without repetition, and what is subtracted from their logits, float32 [M]."""

    ids: "NDArray[np.int64]"
    penalties: "NDArray[np.float32]"


class Repeats:
    """The last ids of one choice, and how long a repetition ends at each of their places."""

    def __init__(self, rules: RepeatRules, ids: Sequence[int]) -> None:
        """`ids`: the sequence so far."""
        self._rules = rules
        self._ids = np.zeros(2 * rules.size, dtype=np.int64)
        self._lengths = np.zeros(2 * rules.size, dtype=np.int64)
        last = ids[-rules.size :]
        self._num = len(last)
        self._ids[: self._num] = last
        self._measure()

    def append(self, token_id: int) -> None:
        """Add a generated id: each repetition goes on with it or is over."""
        size = self._rules.size
        if self._num == len(self._ids):
            for column in (self._ids, self._lengths):
                column[:size] = column[size:]
            self._num = size
        num, ids, lengths = self._num, self._ids, self._lengths
        low = max(0, num - size)
        if self._rules.is_breaker[token_id]:
            lengths[low : num + 1] = 0
        else:
            before = np.zeros(num - low, dtype=np.int64)
            before[1:] = lengths[low : num - 1] if num > low else 0
            is_same = ids[low:num] == token_id
            lengths[low:num] = np.where(is_same, np.minimum(before + 1, MAX_REPEAT), 0)
            lengths[num] = 0
        ids[num] = token_id
        self._num = num + 1

    def penalties(self) -> RepeatPenalties | None:
        """Those of the next id; None if there are none."""
        rules, num = self._rules, self._num
        low = max(0, num - rules.size)
        lengths = self._lengths[low : num - 1]
        if not lengths.any():
            return None
        lengths = np.minimum(lengths, np.arange(1, len(lengths) + 1))  # as far as `size` reaches
        places = rules.penalties[lengths].nonzero()[0]
        following = self._ids[low + 1 + places]
        places = places[~rules.is_breaker[following]]
        if not len(places):
            return None
        longest = places[np.argsort(-lengths[places], kind="stable")]
        ids, first = np.unique(self._ids[low + 1 + longest], return_index=True)
        return RepeatPenalties(ids, rules.penalties[lengths[longest[first]]])

    def _measure(self) -> None:
        """Set the lengths for the ids there are."""
        ids, last = self._ids, self._num - 1
        places = np.arange(max(last, 0))
        for length in range(min(MAX_REPEAT, max(last, 0))):
            token_id = ids[last - length]
            if self._rules.is_breaker[token_id]:
                return
            places = places[places >= length]
            places = places[ids[places - length] == token_id]
            if not len(places):
                return
            self._lengths[places] = length + 1


class BreakerIds:
    """Finds the ids of a tokenizer whose texts have certain strings."""

    def __init__(self, written_bytes: Sequence[bytes]) -> None:
        self._written = written_bytes
        self.find = lru_cache(maxsize=8)(self._find)

    def _find(self, breakers: tuple[str, ...]) -> "NDArray[np.bool_]":
        """Whether an id's text has one of the strings: bool [N]. The last few are remembered."""
        text = _BETWEEN.join(self._written)
        begins = np.array([0, *accumulate(len(each) + 1 for each in self._written)])
        found = np.zeros(len(self._written), dtype=np.bool_)
        for each in breakers:
            places = [match.start() for match in re.finditer(re.escape(each.encode()), text)]
            found[np.searchsorted(begins, places, side="right") - 1] = True
        return found
