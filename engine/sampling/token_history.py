"""What sampling depends on besides logits: counts for penalties, and the last ids for bad words."""

from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from cottention.engine.sampling_params import SamplingParams
from cottention.engine.text.base import BaseTokenizer


class TokenHistory:
    """The ids of one choice, as far as its parameters need them.

    counts: how often each id of the prompt and the text was generated, in earlier turns of a
    session too; empty where there is no penalty.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        bad_words: Sequence[Sequence[int]],
        earlier_counts: Mapping[int, int],
    ) -> None:
        """`earlier_counts`: those of the session before this prompt."""
        self._is_counting = params.has_penalty
        self._bad_words = bad_words
        self._last: deque[int] = deque(maxlen=max((len(ids) - 1 for ids in bad_words), default=0))
        self.counts = (
            TokenCounts(prompt_ids, earlier_counts) if self._is_counting else TokenCounts()
        )

    def append(self, token_id: int) -> None:
        """Add a generated id."""
        self._last.append(token_id)
        if self._is_counting:
            self.counts.add(token_id)

    def masked_token_ids(self) -> list[int]:
        """Ids that would complete a bad word now."""
        if not self._bad_words:
            return []
        last = list(self._last)
        return [
            ids[-1] for ids in self._bad_words if last[len(last) - len(ids) + 1 :] == list(ids[:-1])
        ]


def encode_bad_words(words: Sequence[str], tokenizer: BaseTokenizer) -> list[list[int]]:
    """Ids of each word at the start of a text and after a space; of a blank word, the latter."""
    texts = [start + word.lstrip(" ") for word in words for start in ("", " ")]
    return [ids for text in texts if (ids := tokenizer.encode(text))]


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
