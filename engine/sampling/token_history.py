"""What sampling depends on besides logits: counts for penalties, and the last ids for bad words."""

from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from cottention.engine.sampling_params import SamplingParams

if TYPE_CHECKING:  # it holds tensors; histories need no torch
    from cottention.engine.sampling.token_constraints import TokenConstraints


class TokenHistory:
    """The ids of one choice, as far as its parameters need them.

    counts: how often each id of the prompt and the text was generated, in earlier turns of a
    session too; empty where there is no penalty.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        constraints: "TokenConstraints",
        earlier_counts: Mapping[int, int],
    ) -> None:
        """`earlier_counts`: those of the session before this prompt."""
        self._is_counting = params.has_penalty
        self._constraints = constraints
        self._last: deque[int] = deque(maxlen=constraints.max_history)
        self.counts = (
            TokenCounts(prompt_ids, earlier_counts) if self._is_counting else TokenCounts()
        )

    def append(self, token_id: int) -> None:
        """Add a generated id."""
        self._last.append(token_id)
        if self._is_counting:
            self.counts.add(token_id)

    def ends_of_bad_words(self) -> list[int]:
        """Ids that would complete a bad word of several ids now."""
        return self._constraints.ends_of_bad_words(self._last)


class TokenCounts:
    """Ids and how often each was generated, in two arrays that tensors can view.

    ids: int64, without repetition; times: float32.
    """

    def __init__(
        self, prompt_ids: Iterable[int] = (), generated: Mapping[int, int] | None = None
    ) -> None:
        """`prompt_ids` count 0 times; `generated`: how often each id was generated before."""
        times = {**dict.fromkeys(prompt_ids, 0), **(generated or {})}
        self.ids = array("q", times)
        self.times = array("f", times.values())
        self._places = {token_id: place for place, token_id in enumerate(times)}

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, token_id: int) -> None:
        """Count a generated id."""
        place = self._places.setdefault(token_id, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token_id)
            self.times.append(0)
        self.times[place] += 1
