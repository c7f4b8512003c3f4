"""What sampling depends on besides logits: counts for penalties, repetitions, and the last ids."""

from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from cottention.engine.sampling.dry import RepeatPenalties, Repeats
from cottention.engine.sampling_params import SamplingParams

if TYPE_CHECKING:  # it holds tensors; histories need no torch
    from cottention.engine.sampling.token_constraints import TokenConstraints


class TokenHistory:
    """The ids of one choice, as far as its parameters need them.

    matters: whether generated ids change what comes next, besides the model; else none need be
    appended.
    counts: how often each id of the prompt and the text was generated, in earlier turns of a
    session too; empty where there is no penalty.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        constraints: "TokenConstraints",
        earlier_counts: Mapping[int, int],
        all_ids: Sequence[int] = (),
    ) -> None:
        """`earlier_counts`: those of the session before this prompt.

        all_ids: the ids of the session that are known, and the prompt's.
        """
        self._is_counting = params.has_penalty
        self._constraints = constraints
        self._last: deque[int] = deque(maxlen=constraints.max_history)
        self.counts = (
            TokenCounts(prompt_ids, earlier_counts) if self._is_counting else TokenCounts()
        )

        rules = constraints.repeats
        self._repeats = None if rules is None else Repeats(rules, all_ids)
        is_recalled = self._repeats is not None or bool(constraints.bad_words)
        self.matters = self._is_counting or is_recalled

    def append(self, token_id: int) -> None:
        """Add a generated id."""
        self._last.append(token_id)
        if self._repeats is not None:
            self._repeats.append(token_id)
        if self._is_counting:
            self.counts.add(token_id)

    def repeat_penalties(self) -> RepeatPenalties | None:
        """Of the ids that would go on with a repetition now."""
        return None if self._repeats is None else self._repeats.penalties()

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
